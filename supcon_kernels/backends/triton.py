"""Triton kernels on CUDA tensors: float32, float16 and bfloat16, any variant, integer labels or none.

This file prepares both sides of a call and launches what ``triton_launch`` plans. The host reads
nothing off the device and every shape follows from the inputs' shapes, so that a call can be
captured in a CUDA graph. docs/kernels.md says what the kernels do.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from supcon_kernels import triton_launch
from supcon_kernels.problem import Problem
from supcon_kernels.triton_launch import Launch, Plan, Target, Tile

# Down to the first, sums of 2^x over unit rows stay within half of float32's exponents; up to the
# second, rows that carry the temperature are not so small that float16 loses their bits.
SHIFTED_TEMPERATURES = (0.023, 4.0)
# Probabilities are multiplied by this before they are rounded to float16, whose subnormals begin
# at 2^-14, and stay within its range: both anchors of a pair add up to at most 2^15.
HEADROOM = 2.0**14
# Contrasts of a class up to which its positives are taken off one by one. Each of them may be
# nearly all of a softmax, and what is left of it would be less than the rounding to 16 bits.
FEW_POSITIVES = 8
LOG2_E = math.log2(math.e)
# Whether the first call of each shape tries other tiles than those of the table, for minutes, and
# keeps the fastest. Their sums are added in another order, so the last bits may differ.
autotune = False
_measured: dict[Plan, Plan] = {}
_LAST_KEY = 2**63 - 1
_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
# The first with triton.knobs, by which the kernels know the interpreter.
_OLDEST_TRITON = (3, 4)


def _not_installed() -> str | None:
    """What this installation lacks, in one sentence."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton."
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_TRITON:
        return f"triton is of version {version}, and it needs 3.4 or newer."
    if torch.version.hip is not None and not _INTERPRETED:
        return "its kernels are for NVIDIA's chips, and this torch is built for AMD's."
    return None


_lacks = _not_installed()


def unavailable() -> str | None:
    """Why this backend cannot run on this machine, in one sentence; None: it can."""
    if _lacks is not None or _INTERPRETED:
        return _lacks
    if not torch.cuda.is_available():
        return "there is no CUDA device."
    refusals = [_too_old(torch.device("cuda", k)) for k in range(torch.cuda.device_count())]
    return None if None in refusals else refusals[0]


def description() -> str:
    """What of the kernels has been shown, and what has not."""
    return (
        "(interpreted and compiled for sm_80, sm_86, sm_90 and sm_100; not yet measured on a GPU)"
    )


def why_not(problem: Problem) -> str | None:
    """Why this backend cannot take ``problem``, in one sentence; None: it can."""
    if _lacks is not None:
        return _lacks
    device = problem.rows.device
    if device.type != "cuda" and not (_INTERPRETED and device.type == "cpu"):
        return f"the features are on {device}, and it runs on CUDA."
    if problem.rows.dtype not in _DTYPES:
        return f"it takes float32, float16 and bfloat16 features, not {problem.rows.dtype}."
    if problem.weights is not None:
        return "it takes labels or none, not a mask."
    if not problem.has_integer_labels:
        return "it takes integer labels or none, not soft ones."
    if problem.rows.shape[1] > triton_launch.MAX_DIM:
        return f"it takes up to {triton_launch.MAX_DIM} features, not {problem.rows.shape[1]}."
    return None if _INTERPRETED else _too_old(device)


def _too_old(device: torch.device) -> str | None:
    properties = torch.cuda.get_device_properties(device)
    if properties.major >= 8:
        return None
    capability = f"{properties.major}.{properties.minor}"
    return f"{properties.name} is of compute capability {capability}, and it needs 8.0 or newer."


def forward(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (N,), total and counts as ``Problem.reduced`` has them, statistics (3, N) for ``backward``.

    The statistics of a row are, base 2, the log-sum-exp of its denominator; the number of its
    positives, or ("in") the log-sum-exp over them; and the weight of the softmax part of its
    gradient. The first two are infinite where the row does not contribute.
    """
    call = _Call(problem)
    if autotune and call.plan not in _measured and not _is_capturing(call):
        _measured[call.plan] = _measure(call)
    return _forward(call.as_measured())


def _forward(call: _Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plan, rows, cols, band = call.plan, call.rows, call.cols, call.band_of_rows
    n, padded = plan.num_rows, triton_launch.padded_rows(plan.num_rows)
    loss = torch.empty(n, dtype=torch.float32, device=call.device)
    stats = torch.empty(3, n, dtype=torch.float64, device=call.device)
    contributes = loss.new_empty(padded)
    powers = loss.new_empty(plan.forward_splits, 4, padded)
    totals = stats.new_empty(plan.num_totals if plan.sums_positives else 0, padded)
    logits = loss.new_empty(2, padded) if plan.denominator == "one_positive" else powers
    valid = {"num_valid_rows_ptr": rows.num_valid, "num_valid_cols_ptr": cols.num_valid}
    pairs = {"rows_ptr": rows.prepared, "cols_ptr": cols.prepared, "scale_ptr": call.scale}
    with call.on_device():
        rows.prepare(call)
        if cols is not rows:
            cols.prepare(call)
        if plan.sums_positives:
            _run(
                plan.positive_sums(),
                rows_ptr=rows.prepared,
                cols_ptr=cols.prepared,
                sums_ptr=cols.chunk_sums(plan, None),
                num_valid_ptr=rows.num_valid,
                totals_ptr=totals,
                padded_rows=padded,
                **band,
            )
        _run(plan.forward(), powers_ptr=powers, padded_rows=padded, **pairs, **band, **valid)
        if plan.denominator == "one_positive":
            _run(
                plan.one_positive(),
                powers_ptr=powers,
                logits_ptr=logits,
                padded_rows=padded,
                num_splits=len(powers),
                **pairs,
                **band,
                **valid,
            )
        _run(
            plan.finish_loss(),
            powers_ptr=powers,
            totals_ptr=totals,
            logits_ptr=logits,
            order_ptr=rows.order,
            scale_ptr=call.scale,
            poison_ptr=call.poison(),
            loss_ptr=loss,
            stats_ptr=stats,
            contributes_ptr=contributes,
            num_rows=n,
            padded_rows=padded,
            num_splits=len(powers),
            num_totals=len(totals),
            **band,
            **valid,
        )
    return *call.problem.reduced(loss, contributes), stats


def backward(
    problem: Problem,
    grad_loss: Tensor,
    stats: Tensor,
    needs_rows: bool,
    needs_cols: bool,
    needs_temperature: bool,
    col_grad_loss: Tensor | None = None,
    col_stats: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows (N, D), cols (M, D) and the temperature (0-dim); (0,) where not needed.

    The columns are anchors, too, where ``col_grad_loss`` (M,) and ``col_stats`` (3, M) are given.
    """
    call = _Call(problem).as_measured()
    anchors = [(call.rows, grad_loss, stats)]
    if col_grad_loss is not None and col_stats is not None:
        anchors.append((call.cols, col_grad_loss, col_stats))
    return _backward(call, anchors, needs_rows, needs_cols, needs_temperature)


def _backward(
    call: _Call,
    anchors: list[tuple[_Side, Tensor, Tensor]],
    needs_rows: bool,
    needs_cols: bool,
    needs_temperature: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``backward``; ``anchors`` are the sides that have losses, with gradients and statistics."""
    plan, rows, cols = call.plan, call.rows, call.cols
    grad_rows = grad_cols = rows.features.new_empty(0)
    grad_tau = torch.empty(0, dtype=torch.float32, device=call.device)
    with call.on_device():
        rows.prepare(call)
        if cols is not rows:
            cols.prepare(call)
        of_sides, factor = _weights(call, anchors)
        both = plan.square or len(of_sides) == 2
        weights, of_cols = of_sides[0], of_sides[-1] if both else None
        if needs_rows or needs_temperature:
            gradient, dots = _gradient(call, weights, of_cols, factor, of_columns=False)
            grad_rows = gradient if needs_rows else grad_rows
        if needs_cols:
            grad_cols, _ = _gradient(call, None, weights, factor, of_columns=True)
    if needs_temperature:
        share = 0.5 if both else 1.0  # every pair is in the gradient of both its rows
        grad_tau = (-share / call.fold * dots.sum() / call.tau).to(torch.float32)
    return grad_rows, grad_cols, grad_tau


def _weights(
    call: _Call, anchors: list[tuple[_Side, Tensor, Tensor]]
) -> tuple[list[Tensor], Tensor]:
    """(4, padded rows) what each anchor weighs, and the factor that was taken out, 0-dim float64."""
    peaks = []
    for _, grad_loss, stats in anchors:
        sizes = grad_loss.to(torch.float32).masked_fill(stats[1] == math.inf, 0.0).abs()
        peaks.append(sizes.amax() if len(sizes) else sizes.sum())
    peak = peaks[0] if len(peaks) == 1 else torch.maximum(*peaks)
    of_sides = []
    for side, grad_loss, stats in anchors:
        upstream, n = grad_loss.to(torch.float32), len(side.order)
        plan = dataclasses.replace(call.plan, num_rows=n) if side is not call.rows else call.plan
        padded = triton_launch.padded_rows(n)
        weights = torch.empty(4, padded, dtype=torch.float32, device=call.device)
        _run(
            plan.weights(),
            upstream_ptr=upstream,
            peak_ptr=peak,
            stats_ptr=stats.contiguous(),
            order_ptr=side.order,
            weights_ptr=weights,
            num_rows=n,
            padded_rows=padded,
            upstream_stride=upstream.stride(0),
            headroom=HEADROOM,
        )
        of_sides.append(weights)
    return of_sides, peak.double() / (HEADROOM * call.fold * call.tau)


def _gradient(
    call: _Call,
    of_owner: Tensor | None,
    of_streamed: Tensor | None,
    factor: Tensor,
    *,
    of_columns: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of the features of one side, and (rows,) dot products with its prepared rows.

    Args:
        call: the call.
        of_owner, of_streamed: what the anchors of that side and of the other weigh; None: it has no
            anchors.
        factor: what was taken out of the weights.
        of_columns: whether the side is the columns'.
    """
    plan = call.plan
    both_anchor = of_owner is not None and of_streamed is not None
    given = of_owner if of_streamed is None else of_streamed
    assert given is not None
    owner_weights = given if of_owner is None else of_owner  # what is not there is not read
    streamed_weights = given
    owner, streamed = (call.cols, call.rows) if of_columns else (call.rows, call.cols)
    band = call.band_of_cols if of_columns else call.band_of_rows
    in_tiles, by_class = call.divided(band, owner) if plan.by_class else (band, band)
    padded = len(owner.prepared)
    splits = plan.backward_splits(of_columns)
    slices = torch.empty(
        splits + plan.by_class, *owner.prepared.shape, dtype=torch.float32, device=call.device
    )
    _run(
        plan.backward(of_columns=of_columns, both_anchor=both_anchor),
        rows_ptr=owner.prepared,
        cols_ptr=streamed.prepared,
        row_weights_ptr=owner_weights,
        col_weights_ptr=streamed_weights,
        num_valid_rows_ptr=owner.num_valid,
        num_valid_cols_ptr=streamed.num_valid,
        scale_ptr=call.scale,
        slices_ptr=slices,
        padded_rows=padded,
        padded_cols=len(streamed.prepared),
        **in_tiles,
    )
    if plan.by_class:
        col_pull, sums = streamed_weights[2], []
        if of_owner is not None:
            sums.append(streamed.chunk_sums(plan, None))
        if of_streamed is not None:
            sums.append(streamed.chunk_sums(plan, col_pull))
        _run(
            plan.attraction(of_columns=of_columns, both_anchor=both_anchor),
            rows_ptr=owner.prepared,
            cols_ptr=streamed.prepared,
            row_pull_ptr=owner_weights[2],
            col_pull_ptr=col_pull,
            sums_ptr=sums[0],
            weighted_sums_ptr=sums[-1],
            num_valid_ptr=owner.num_valid,
            slices_ptr=slices[-1],
            **by_class,
        )
    n, dim = owner.features.shape
    gradient = torch.empty_like(owner.features)
    dots = torch.empty(n, dtype=torch.float64, device=call.device)
    _run(
        plan.finish_gradient(n),
        slices_ptr=slices,
        features_ptr=owner.features,
        rows_ptr=owner.prepared,
        order_ptr=owner.order,
        num_valid_ptr=owner.num_valid,
        factor_ptr=factor,
        gradient_ptr=gradient,
        dots_ptr=dots,
        num_rows=n,
        dim=dim,
        num_slices=len(slices),
        padded_rows=padded,
    )
    return gradient, dots


def _measure(call: _Call) -> Plan:
    """The plan of the call with the tiles that were fastest in it."""
    plan, wanted = call.plan, (True, call.cols is not call.rows, True)
    # In the table's own tiles first: what fails there is no matter of tiles.
    loss, _, _, stats = _forward(call)
    anchors = [(call.rows, torch.ones_like(loss), stats)]
    _backward(call, anchors, *wanted)

    def forward_seconds(tile: Tile) -> float:
        return _seconds(call.with_tiles(tile, plan.backward_tile), _forward)

    def backward_seconds(tile: Tile) -> float:
        return _seconds(
            call.with_tiles(plan.forward_tile, tile), lambda c: _backward(c, anchors, *wanted)
        )

    tiles = (
        triton_launch.fastest(plan.forward_tile, plan.dim, forward_seconds),
        triton_launch.fastest(plan.backward_tile, plan.dim, backward_seconds),
    )
    return dataclasses.replace(plan, measured=tiles)


def _seconds(call: _Call, run: Callable[[_Call], object]) -> float:
    """The median time of a few runs; infinity where the tile cannot be compiled or launched."""
    try:
        run(call)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception:  # whatever the compiler or the launcher raises: the tile is out
        return math.inf
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run(call)
        if call.device.type == "cuda":
            torch.cuda.synchronize(call.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _is_capturing(call: _Call) -> bool:
    with call.on_device():
        return call.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _run(launch: Launch, **arguments: Any) -> None:
    from supcon_kernels import triton_kernels  # only here: importing it needs triton

    getattr(triton_kernels, launch.kernel)[launch.grid](
        **arguments,
        **launch.constexprs,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


# --- a call and its sides, on the device


@dataclasses.dataclass
class _Side:
    """The rows of one side, sorted by label with the ignored ones last.

    Attributes:
        features: (n, D) as given, contiguous.
        keys: (n,) sorted labels, the ignored ones as the largest.
        order: (n,) which row of ``features`` is sorted row i.
        num_valid: 0-dim, how many are not ignored.
        prepared: (padded n, padded D) sorted, normalised, scaled, rounded.
        poison: (padded n,) 0, or NaN where a row that takes part is not finite.
    """

    features: Tensor
    keys: Tensor
    order: Tensor
    num_valid: Tensor
    prepared: Tensor
    poison: Tensor

    @staticmethod
    def of(features: Tensor, labels: Tensor, ignore_index: int) -> _Side:
        # Adding turns the circle of all int64 until ignore_index is the largest; labels stay distinct.
        turn = (_LAST_KEY - ignore_index + 2**63) % 2**64 - 2**63
        keys, order = torch.sort(labels + turn, stable=True)
        shape = (
            triton_launch.padded_rows(features.shape[0]),
            triton_launch.padded_dim(features.shape[1]),
        )
        return _Side(
            features.contiguous(),
            keys,
            order,
            (keys != _LAST_KEY).sum(),
            torch.empty(shape, dtype=features.dtype, device=features.device),
            torch.empty(shape[0], dtype=torch.float32, device=features.device),
        )

    def prepare(self, call: _Call) -> None:
        """Fill ``prepared`` and ``poison``."""
        n, dim = self.features.shape
        _run(
            call.plan.prepare(n),
            features_ptr=self.features,
            order_ptr=self.order,
            num_valid_ptr=self.num_valid,
            rows_ptr=self.prepared,
            poison_ptr=self.poison,
            num_rows=n,
            dim=dim,
            fold=call.fold,
        )

    def chunk_sums(self, plan: Plan, weights: Tensor | None) -> Tensor:
        """(chunks, padded D) float64 sums of the prepared rows."""
        padded, dim = self.prepared.shape
        sums = torch.empty(
            padded // triton_launch.CHUNK_ROWS, dim, dtype=torch.float64, device=self.keys.device
        )
        _run(
            plan.chunk_sums(len(self.features), weighted=weights is not None),
            rows_ptr=self.prepared,
            weights_ptr=self.poison if weights is None else weights,
            sums_ptr=sums,
        )
        return sums

    def band(self, other: _Side, own: Tensor) -> dict[str, Tensor]:
        """Where in ``other`` the positives of each row are, and the row itself."""
        begin = torch.searchsorted(other.keys, self.keys, out_int32=True)
        end = torch.searchsorted(other.keys, self.keys, right=True, out_int32=True)
        return {"begin_ptr": begin, "end_ptr": end, "own_ptr": own}


class _Call:
    """A problem on its device: the sides, the plan of its launches and the temperature."""

    def __init__(self, problem: Problem) -> None:
        assert problem.row_labels is not None
        self.problem = problem
        self.device = problem.rows.device
        self.tau = _temperature(problem)
        low, high = SHIFTED_TEMPERATURES
        shifted = problem.normalize and isinstance(self.tau, float) and low <= self.tau <= high
        # √(log₂e/τ) on both sides makes their products exponents.
        self.fold = math.sqrt(LOG2_E / self.tau) if shifted else 1.0
        scale = LOG2_E / self.tau
        if not isinstance(scale, Tensor):
            scale = torch.full((), scale, dtype=torch.float32, device=self.device)
        self.scale = scale
        self.plan = triton_launch.plan_of(
            _DTYPES[problem.rows.dtype],
            problem.rows.shape[1],
            problem.rows.shape[0],
            None if problem.cols is None else problem.cols.shape[0],
            _target(self.device),
            shifted,
            problem.summation,
            problem.denominator,
            problem.normalize,
            problem.rows.dtype == torch.float32 and _wants_tf32(),
        )
        self.rows = _Side.of(problem.rows, problem.row_labels, problem.ignore_index)
        self.cols = self.rows
        if problem.cols is not None:
            assert problem.col_labels is not None
            self.cols = _Side.of(problem.cols, problem.col_labels, problem.ignore_index)

    def with_tiles(self, forward: Tile, backward: Tile) -> _Call:
        """The same call in other tiles."""
        call = copy.copy(self)
        call.plan = dataclasses.replace(self.plan, measured=(forward, backward))
        return call

    def as_measured(self) -> _Call:
        """This call in the tiles that were measured for it, if any were."""
        self.plan = _measured.get(self.plan, self.plan)
        return self

    def on_device(self) -> contextlib.AbstractContextManager[Any]:
        """Launches go to the current stream of the features' device."""
        if self.device.type == "cuda":
            return torch.cuda.device(self.device)
        return contextlib.nullcontext()

    def poison(self) -> Tensor:
        """0-dim: 0, or NaN where a row that takes part is not finite."""
        poison = self.rows.poison.sum()
        return poison if self.cols is self.rows else poison + self.cols.poison.sum()

    def divided(self, band: dict[str, Tensor], owner: _Side) -> tuple[dict[str, Tensor], ...]:
        """The bands of those with few positives and the bands of the others, empty for the rest."""
        keys = self.cols.keys
        begin = torch.searchsorted(keys, owner.keys)
        is_few = torch.searchsorted(keys, owner.keys, right=True) - begin <= FEW_POSITIVES
        begin, end = band["begin_ptr"], band["end_ptr"]
        few, many = torch.where(is_few, end, begin), torch.where(is_few, begin, end)
        return {**band, "end_ptr": few}, {**band, "end_ptr": many}

    @property
    def band_of_rows(self) -> dict[str, Tensor]:
        """The positives of each row among the columns."""
        rows, cols, offset = self.rows, self.cols, self.problem.self_offset
        if rows is cols:
            own = torch.arange(len(rows.order), dtype=torch.int32, device=self.device)
        elif offset is None:
            own = torch.full_like(rows.order, -1, dtype=torch.int32)
        else:
            own = _inverse(cols.order)[offset + rows.order]
        return rows.band(cols, own)

    @property
    def band_of_cols(self) -> dict[str, Tensor]:
        """The positives of each column among the rows, of a rectangular call."""
        rows, cols, offset = self.rows, self.cols, self.problem.self_offset
        own = torch.full_like(cols.order, -1, dtype=torch.int32)
        if offset is not None:
            own[offset : offset + len(rows.order)] = _inverse(rows.order)
            own = own[cols.order]
        return cols.band(rows, own)


def _inverse(order: Tensor) -> Tensor:
    """(n,) int32: where ``order`` puts each row."""
    places = torch.arange(len(order), dtype=torch.int32, device=order.device)
    return torch.empty_like(places).scatter_(0, order, places)


def _temperature(problem: Problem) -> Tensor | float:
    """The temperature as a number where the host may know it without waiting for the device."""
    tau = problem.temperature_tensor
    if tau is None:
        return problem.temperature
    if tau.device.type == "cpu":
        return float(tau)
    return tau.to(torch.float32)


def _wants_tf32() -> bool:
    """Whether torch was told that its own products of float32 on CUDA may be of TF32."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return bool(matmul.fp32_precision == "tf32")
    return bool(matmul.allow_tf32)


def _target(device: torch.device) -> Target:
    if device.type != "cuda":
        return triton_launch.INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    architecture = triton_launch.architecture(properties.major, properties.minor)
    return Target(architecture, properties.multi_processor_count)
