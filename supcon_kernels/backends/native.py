"""The compiled core of csrc/ on CPU tensors: integer labels or none, every variant, float32 and float64.

This file hands it pointers; docs/kernels.md says what it does with them. 16-bit features are
widened to float32 on the way in.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from supcon_kernels._version import __version__
from supcon_kernels.problem import Problem


def _load_core() -> Any:
    try:
        return importlib.import_module("_supcon_kernels")
    except ImportError:
        return None


core = _load_core()
# The instruction set that the core uses: the best that this CPU runs. Tests set a lower one.
isa: str | None = core.isa_names()[0] if core is not None else None


def unavailable() -> str | None:
    """Why this backend cannot run on this machine, in one sentence; None: it can."""
    if core is None:
        return (
            "the compiled core is not installed: install supcon-kernels again where there is a "
            "C++17 compiler (g++ or clang++)."
        )
    if core.__version__ != __version__:
        return (
            f"the compiled core is of version {core.__version__}, the package of {__version__}: "
            "install supcon-kernels again."
        )
    return None


def description() -> str:
    """What the core was built with and runs on here."""
    return f"{isa} of {', '.join(core.isa_names())}; threads by {core.threading}"


def why_not(problem: Problem) -> str | None:
    """Why this backend cannot take ``problem``, in one sentence; None: it can."""
    if problem.rows.device.type != "cpu":
        return f"the features are on {problem.rows.device}, and it runs on the CPU."
    if not problem.has_integer_labels:
        return "it takes integer labels or none, not soft labels or a mask."
    return None


def forward(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (N,), whether each anchor contributes (N,) bool, and the statistics (3, N) for ``backward``.

    The statistics of a row are the log-sum-exp of its denominator, the normaliser of its
    positives (their number, or the log-sum-exp over them), and the weight of the softmax part of
    its gradient.
    """
    n = problem.rows.shape[0]
    loss = torch.empty(n, dtype=problem.dtype)
    contributes = torch.empty(n, dtype=torch.bool)
    stats = torch.empty(3, n, dtype=problem.dtype)
    _call(problem).forward(
        loss.data_ptr(), contributes.data_ptr(), *(row.data_ptr() for row in stats)
    )
    return loss, contributes, stats


def backward(
    problem: Problem,
    grad_loss: Tensor,
    stats: Tensor,
    needs_rows: bool,
    needs_cols: bool,
    needs_temperature: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows (N, D), cols (M, D) and the temperature (0-dim); (0,) where not needed."""
    grad_loss, stats = grad_loss.contiguous(), stats.contiguous()
    rows, cols = problem.rows, problem.rows if problem.cols is None else problem.cols
    grad_rows = torch.empty(rows.shape if needs_rows else (0,), dtype=problem.dtype)
    grad_cols = torch.empty(cols.shape if needs_cols else (0,), dtype=problem.dtype)
    grad_tau = torch.empty(() if needs_temperature else (0,), dtype=torch.float64)
    _call(problem).backward(
        grad_loss.data_ptr(),
        *(row.data_ptr() for row in stats),
        grad_rows.data_ptr() if needs_rows else 0,
        grad_cols.data_ptr() if needs_cols else 0,
        grad_tau.data_ptr() if needs_temperature else 0,
    )
    return grad_rows.to(rows.dtype), grad_cols.to(rows.dtype), grad_tau.to(problem.dtype)


def _call(problem: Problem) -> Any:
    """The problem as the core takes it, with the tensors whose memory it points into."""
    assert problem.row_labels is not None
    tau = problem.temperature_tensor
    rows = problem.rows.to(problem.dtype).contiguous()
    row_labels = problem.row_labels.contiguous()
    cols, col_labels = rows, row_labels
    if problem.cols is not None and problem.col_labels is not None:
        cols = problem.cols.to(problem.dtype).contiguous()
        col_labels = problem.col_labels.contiguous()
    call = core.Call(
        rows=rows.data_ptr(),
        cols=cols.data_ptr(),
        row_labels=row_labels.data_ptr(),
        col_labels=col_labels.data_ptr(),
        square=problem.square,
        num_rows=rows.shape[0],
        num_cols=cols.shape[0],
        dim=rows.shape[1],
        ignore_label=problem.ignore_index,
        self_offset=-1 if problem.self_offset is None else problem.self_offset,
        temperature=problem.temperature if tau is None else float(tau),
        normalize=problem.normalize,
        summation=problem.summation,
        denominator=problem.denominator,
        is_double=problem.dtype == torch.float64,
        isa=isa,
        threads=torch.get_num_threads(),
    )
    call.held = (rows, cols, row_labels, col_labels)
    return call
