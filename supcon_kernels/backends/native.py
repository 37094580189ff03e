"""The compiled core of csrc/ on CPU tensors: float32 and float64.

This file hands it pointers; docs/kernels.md says what it does with them. float16 features are
widened to float32 on the way in, bfloat16 ones where this CPU does not multiply them faster. Masks
and soft labels are read where they are, in any dtype.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from supcon_kernels import partial_sums
from supcon_kernels._version import __version__
from supcon_kernels.backends.protocol import Anchors, Made, Results, Wanted
from supcon_kernels.problem import Problem, by_sample

# That of csrc/supcon.h: a core that was compiled before it changed takes other arguments.
INTERFACE = 9
# Up to so many pairs a preparation saved is worth keeping a gradient for.
MAX_PAIRS_AT_ONCE = 2**22
# Of so few anchors it takes longer than the pairs, and a gradient of theirs alone is small.
MAX_ANCHORS_AT_ONCE = 256


def _load_core() -> tuple[Any, str]:
    try:
        return importlib.import_module("_supcon_kernels"), ""
    except ImportError as error:
        return None, str(error)


core, import_error = _load_core()
# The instruction set that the core uses: the best that this CPU runs. Tests set a lower one.
isa: str | None = core.isa_names()[0] if core is not None else None
# How many threads it uses; the benchmark of threads sets others.
num_threads = torch.get_num_threads


def unavailable() -> str | None:
    """Why this backend cannot run on this machine, in one sentence; None: it can."""
    if core is None:
        return (
            f"the compiled core is not there ({import_error}): install supcon-kernels again where "
            "there is a C++17 compiler (g++ or clang++)."
        )
    built = core.__version__, getattr(core, "interface", 0)
    if built != (__version__, INTERFACE):
        return (
            f"the compiled core is of version {built[0]} (interface {built[1]}), the package of "
            f"{__version__} (interface {INTERFACE}): install supcon-kernels again."
        )
    return None


def description() -> str:
    """What the core was built with and runs on here."""
    products = "16 bits" if core.multiplies_bfloat16(isa) else "float32"
    return (
        f"{isa} of {', '.join(core.isa_names())}; bfloat16 multiplied in {products}; "
        f"threads by {core.threading}"
    )


def why_not(problem: Problem) -> str | None:
    """Why this backend cannot take ``problem``, in one sentence; None: it can."""
    if (reason := unavailable()) is not None:
        return reason
    if problem.rows.device.type != "cpu":
        return f"the features are on {problem.rows.device}, and it runs on the CPU."
    return None


def saved(problem: Problem) -> tuple[Tensor, Tensor]:
    """Statistics (3, N), ``RowStatistics`` in csrc/supcon.h, and nothing prepared."""
    stats = problem.rows.new_empty(3, problem.num_rows, dtype=torch.float64)
    return stats, problem.rows.new_empty(0)


def makes_gradients(problem: Problem, reduction: str) -> bool:
    """Whether loss and gradients are made faster together: of few pairs, or of few anchors alone."""
    if problem.symmetric or reduction == "none":
        return False
    if problem.num_rows * problem.num_cols <= MAX_PAIRS_AT_ONCE:
        return True
    wants_cols = problem.cols is not None and problem.cols.requires_grad
    return problem.num_rows <= MAX_ANCHORS_AT_ONCE and not wants_cols


def loss_and_gradients(problem: Problem, reduction: str, wanted: Wanted) -> tuple[Tensor, Made]:
    """The loss, and its gradients in the working dtype, of one preparation in one entry."""
    by_rows = problem.by_rows()
    loss, made = _empty((), problem.dtype), _empty_gradients(by_rows, wanted)
    _call(by_rows).loss_and_gradients(reduction, loss.data_ptr(), *_addresses(made))
    if not problem.has_integer_labels:
        loss += problem.target_poison()
    return loss, _given(problem, made, problem.dtype)


def forward(problem: Problem, reduction: str) -> Results:
    """The loss; of both ways, of one set of similarities."""
    by_rows, ways = problem.by_rows(), problem.ways()
    found = [_empty_results(way, reduction) for way in ways]
    _call(by_rows).forward(reduction, *[tuple([x.data_ptr() for x in way[:3]]) for way in found])
    if not problem.has_integer_labels:
        for way, results in zip(ways, found):
            results.loss.add_(way.target_poison())
    return Results.of_ways(found)


def forward_of_some(problem: Problem, negatives: Tensor | None = None) -> tuple[Results, Tensor]:
    """The loss of each row, and the sums of columns that have other contrasts besides."""
    one_way, other_way = problem.ways()
    found = _empty_results(one_way, "none")
    sums = _empty((partial_sums.count(problem), problem.num_cols), torch.float64)
    places = tuple([x.data_ptr() for x in found[:3]])
    if negatives is not None:
        negatives = negatives.double().contiguous()
    known = 0 if negatives is None else negatives.data_ptr()
    _call(problem.by_rows()).forward("none", places, sums_of_cols=sums.data_ptr(), negatives=known)
    if not problem.has_integer_labels:
        found.loss.add_(one_way.target_poison())
        sums.add_(other_way.target_poison())
    return found, sums


def statistics_of(problem: Problem, sums: Tensor) -> Tensor:
    """``RowStatistics``, base 2."""
    lse, of_positives, total = sums[:3]
    normalizer = total if problem.summation == "out" else of_positives / math.log(2.0)
    softmax_weight = partial_sums.softmax_weights(problem, sums)
    stats = torch.stack((lse / math.log(2.0), normalizer, softmax_weight))
    return stats.masked_fill_(~partial_sums.contributes(problem, sums), torch.inf)


def backward(
    problem: Problem, anchors: Anchors, col_anchors: Anchors | None, wanted: Wanted
) -> Made:
    """The gradients, of similarities that are computed again."""
    by_rows = problem.by_rows()
    made = _empty_gradients(by_rows, wanted)
    sides = [anchors] if col_anchors is None else [anchors, col_anchors]
    read = [_as_core_reads(side, problem.dtype) for side in sides]
    of_rows, *of_cols = [(*_addresses(x), x[0].numel() > 1) for x in read]
    _call(by_rows).backward(of_rows, *_addresses(made), *of_cols)
    return _given(problem, made, problem.dtype if wanted.unrounded else problem.rows.dtype)


def _as_core_reads(side: Anchors, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the loss, the divisor and the statistics of a side."""
    return (
        side.grad_loss.to(dtype).contiguous(),
        side.divisor.to(dtype),
        side.stats.contiguous(),
    )


def _empty_results(problem: Problem, reduction: str) -> Results:
    n, dtype = problem.num_rows, problem.dtype
    loss = _empty((n,) if reduction == "none" else (), dtype)
    return Results(loss, _empty((), dtype), _empty((3, n), torch.float64), _empty((0,), dtype))


def _empty_gradients(problem: Problem, wanted: Wanted) -> Made:
    """In the working dtype: scaled by what came from above, they may fit in no narrower one."""
    rows, cols = problem.rows, problem.rows if problem.cols is None else problem.cols
    return Made(
        _empty(rows.shape, problem.dtype) if wanted.rows else None,
        _empty(cols.shape, problem.dtype) if wanted.cols else None,
        _empty((), torch.float64) if wanted.temperature else None,
    )


def _addresses(tensors: Iterable[Tensor | None]) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in tensors]


def _given(problem: Problem, made: Made, dtype: torch.dtype) -> Made:
    """Gradients of a problem, of the dtype where they are of features, given those of its ``by_rows``."""
    rows, cols, temperature = made
    if rows is not None:
        rows = by_sample(rows.to(dtype), problem.rows)
    if cols is not None and problem.cols is not None:
        cols = by_sample(cols.to(dtype), problem.cols)
    if temperature is not None:
        temperature = temperature.to(problem.dtype)
    return Made(rows, cols, temperature)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory on the CPU, whatever torch's default device is."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def _call(problem: Problem) -> Any:
    """The problem as the core takes it, with the tensors whose memory it points into."""
    tau = problem.temperature_tensor
    is_bfloat16 = problem.rows.dtype == torch.bfloat16
    dtype = torch.bfloat16 if is_bfloat16 else problem.dtype
    rows = problem.rows.to(dtype).contiguous()
    cols = rows if problem.cols is None else problem.cols.to(dtype).contiguous()
    of_rows, of_cols = problem.row_labels, problem.col_labels
    if problem.has_integer_labels:
        assert of_rows is not None
        of_rows = of_rows.long().contiguous()
        of_cols = of_rows if of_cols is None else of_cols.long().contiguous()
        held = [rows, cols, of_rows, of_cols]
        soft_rows = soft_cols = None
    else:
        # Every row takes part, and is of the one class that the core then sees.
        held = [
            rows,
            cols,
            *(torch.zeros(len(x), dtype=torch.int64, device="cpu") for x in (rows, cols)),
        ]
        soft_rows, soft_cols = of_rows, of_rows if of_cols is None else of_cols
    call = core.Call(
        rows=held[0].data_ptr(),
        cols=held[1].data_ptr(),
        row_labels=held[2].data_ptr(),
        col_labels=held[3].data_ptr(),
        row_soft=_matrix(soft_rows),
        col_soft=_matrix(soft_cols),
        mask=_matrix(problem.weights),
        square=problem.square,
        num_rows=rows.shape[0],
        num_cols=cols.shape[0],
        dim=rows.shape[1],
        ignore_label=problem.ignore_index if problem.has_integer_labels else -1,
        self_offset=-1 if problem.self_offset is None else problem.self_offset,
        temperature=problem.temperature if tau is None else float(tau),
        normalize=problem.normalize,
        summation=problem.summation,
        denominator=problem.denominator,
        is_double=problem.dtype == torch.float64,
        is_bfloat16=is_bfloat16,
        symmetric=problem.symmetric,
        isa=isa,
        threads=num_threads(),
    )
    call.held = (held, soft_rows, soft_cols, problem.weights)
    return call


def _matrix(x: Tensor | None) -> tuple[int, str, int, int, int, int] | None:
    """Where a matrix is, what it holds, its shape and its strides."""
    if x is None:
        return None
    return x.data_ptr(), str(x.dtype).removeprefix("torch."), *x.shape, *x.stride()
