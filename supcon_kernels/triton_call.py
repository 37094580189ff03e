"""One call of the Triton kernels: its tensors on the device, and what each launch is given of them.

``triton_launch`` plans the launches; ``backends/triton.py`` has their order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from supcon_kernels import triton_launch, triton_run, triton_soft, triton_tiles
from supcon_kernels.backends.protocol import Anchors, Wanted
from supcon_kernels.problem import Problem
from supcon_kernels.products import accumulated
from supcon_kernels.soft_positives import SoftPositives
from supcon_kernels.triton_launch import Launch
from supcon_kernels.triton_shares import Shares
from supcon_kernels.triton_tiles import Target

# Probabilities are multiplied by this before they are rounded to float16, whose subnormals begin
# at 2^-14, and stay within its range: both anchors of a pair add up to at most 2^15.
HEADROOM = 2.0**14


def _workspace_bytes(mib: str) -> int:
    if not mib.isdecimal() or int(mib) == 0:
        raise ValueError(f"SUPCON_KERNELS_WORKSPACE_MIB must be a whole number > 0, got {mib!r}")
    return 2**20 * int(mib)


# Where rows are wide, so many bytes of H are written at a time.
_default_mib = str(triton_launch.WORKSPACE_BYTES >> 20)
workspace_bytes = _workspace_bytes(os.environ.get("SUPCON_KERNELS_WORKSPACE_MIB", _default_mib))
# A gradient in one piece.
WHOLE = Shares.of_pieces(1)
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def room(problem: Problem) -> Tensor:
    """Where the prepared rows and columns are put."""
    sides = [problem.rows] if problem.cols is None else [problem.rows, problem.cols]
    return problem.rows.new_empty(sum(_size_of(side) for side in sides))


def _size_of(features: Tensor) -> int:
    """Elements of a side's prepared rows, with as many 32-bit classes behind them."""
    padded = triton_tiles.padded_rows(features.shape[:-1].numel())
    return padded * (triton_tiles.padded_dim(features.shape[-1]) + 4 // features.itemsize)


@dataclasses.dataclass(eq=False)
class Side:
    """Anchors or contrasts: as given, and where their prepared rows are.

    Attributes:
        features: (N, D) or (B, V, D).
        labels: (N,) or (B,); zeros where the problem's are soft.
        num_rows: N.
        padded: rows with the zeros behind them.
        rows: (padded, padded D) prepared, and behind them (padded,) int32, equal for equal labels.
        valid: (padded,) 1, 0 where a row takes no part, NaN where it is not finite.
        num_positives: (padded + 1,) int32 of each row, where they are anchors, and a zero.
    """

    features: Tensor
    labels: Tensor
    num_rows: int
    padded: int
    rows: Tensor
    valid: Tensor
    num_positives: Tensor

    @staticmethod
    def of(features: Tensor, labels: Tensor | None) -> Side:
        """A side whose prepared rows have no place yet."""
        assert labels is not None
        if labels.ndim == 2:
            labels = labels.new_zeros(len(labels), dtype=torch.int64)
        if features.stride(-1) != 1:
            features = features.contiguous()
        num_rows = features.shape[:-1].numel()
        padded = triton_tiles.padded_rows(num_rows)
        return Side(features, labels.contiguous(), num_rows, padded, *[features] * 3)

    def matrix(self, width: int) -> Tensor:
        """The prepared rows (padded, padded D)."""
        return self.rows[: self.padded * width].view(self.padded, width)

    def used(self, width: int) -> Tensor:
        """The prepared rows without padding (N, padded D)."""
        return self.matrix(width)[: self.num_rows]

    @property
    def num_samples(self) -> int:
        """At least 1: numbers are divided by it."""
        return max(self.features.shape[0], 1)

    def arguments(self) -> dict[str, Any]:
        """What the kernels take of it."""
        x = self.features
        return {
            "features_ptr": x,
            "labels_ptr": self.labels,
            "rows_ptr": self.rows,
            "valid_ptr": self.valid,
            "num_positives_ptr": self.num_positives,
            "num_rows": self.num_rows,
            "padded_rows": self.padded,
            "num_samples": self.num_samples,
            "dim": x.shape[-1],
            "sample_stride": x.stride(0),
            "view_stride": x.stride(1) if x.ndim == 3 else 0,
        }


class Call:
    """A problem on its device: the sides, the plan of its launches and the temperature."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.device = problem.rows.device
        self.temperature = tau = _temperature(problem)
        self.rows = self.cols = Side.of(problem.rows, problem.row_labels)
        if problem.cols is not None:
            self.cols = Side.of(problem.cols, problem.col_labels)
        self.plan = triton_launch.plan_of(
            DTYPES[problem.rows.dtype],
            problem.rows.shape[-1],
            self.rows.num_rows,
            None if problem.cols is None else self.cols.num_rows,
            _target(self.device),
            None if isinstance(tau, Tensor) else triton_launch.powers_fit(tau),
            problem.summation,
            problem.denominator,
            problem.normalize,
            problem.tf32 and problem.rows.dtype == torch.float32,
            problem.symmetric,
        )
        self.padded_dim = triton_tiles.padded_dim(self.plan.dim)
        # Of every launch. What is not given is not read.
        self.arguments: dict[str, Any] = {
            "temperature_ptr": tau if isinstance(tau, Tensor) else problem.rows,
            "host_temperature": 1.0 if isinstance(tau, Tensor) else tau,
            "on_device": int(isinstance(tau, Tensor)),
            "either": len(self.plan.running) - 1,
            "padded_dim": self.padded_dim,
        }
        offset = problem.self_offset
        self.own_col = triton_launch.NOT_AMONG if offset is None else offset  # of row 0
        self.own_row = triton_launch.NOT_AMONG if offset is None else -offset  # of column 0
        self.soft = None if problem.has_integer_labels else SoftPositives.of(problem)
        self.soft_pulls: tuple[Tensor | None, Tensor | None] = None, None

    def new(self, shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor on the device, not filled."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def on_device(self) -> contextlib.AbstractContextManager[Any]:
        """Launches go to the current stream of the features' device."""
        if self.device.type == "cuda":
            return torch.cuda.device(self.device)
        return contextlib.nullcontext()

    def run(self, launch: Launch, **arguments: Any) -> None:
        """Launch a kernel, which takes what it wants of ``arguments`` and those of every launch."""
        triton_run.run(launch, self.device, self.arguments | arguments)

    def place(self, prepared: Tensor) -> None:
        """Let the sides' prepared rows and classes be parts of ``prepared``."""
        self.prepared = self.rows.rows = prepared
        if not self.plan.square:
            self.cols.rows = prepared[_size_of(self.rows.features) :]

    def prepare(self, *, anchors: tuple[Side, ...] = ()) -> None:
        """Fill the sides' rows and classes, and count the positives of anchors: of the rows, or of both."""
        rows, cols, plan = self.rows, self.cols, self.plan
        most = max(cols.num_samples, rows.num_samples)
        by_order = self.soft is None and plan.sorts_labels(rows.num_samples * most)
        num_anchors, num_contrasts, ignore_index = (
            (rows.labels.shape[0], cols.labels.shape[0], self.problem.ignore_index)
            if self.soft is None
            else (0, 0, -1)  # no label is compared, and no row ignored
        )
        contrasts = cols.labels.sort().values if by_order else cols.labels
        for side in (rows,) if plan.square else (rows, cols):
            counts_rows = plan.square or side in anchors[1:]
            counted = rows if counts_rows else cols
            begin = end = side.labels
            if by_order:
                begin = torch.searchsorted(contrasts, side.labels, out_int32=True)
                end = torch.searchsorted(contrasts, side.labels, out_int32=True, right=True)
                if counts_rows and not plan.square:
                    end = begin + _occurrences(side.labels, rows.labels)
            side.valid = self.new(side.padded)
            side.num_positives = self.new(side.padded + 1, torch.int32)
            self.run(
                plan.prepare(side.num_rows),
                **side.arguments(),
                anchor_labels_ptr=rows.labels,
                contrast_labels_ptr=cols.labels,
                sorted_begin_ptr=begin,
                sorted_end_ptr=end,
                num_anchors=num_anchors,
                num_contrasts=num_contrasts,
                num_contrast_views=counted.num_rows // counted.num_samples,
                own_offset=self.own_col,
                ignore_index=ignore_index,
                has_anchors=int(side in anchors),
                is_square=int(counts_rows),
                is_sorted=int(by_order),
            )

    def sums(self, num_pieces: int, side: Side, *, of_nothing: bool) -> Tensor:
        """(pieces, 4, padded) where the forward kernel writes a side's sums, or adds to those of nothing."""
        sums = self.new((num_pieces, 4, side.padded))
        if of_nothing:
            sums[:, ::2] = 0.0
            sums[:, 1::2] = triton_launch.LOWEST
        return sums

    def pairs(self, owner: Side) -> dict[str, Any]:
        """What the pair kernels take of a side as their rows, and of the other as their columns."""
        is_rows = owner is self.rows
        streamed = self.cols if is_rows else self.rows
        return {
            "rows_ptr": owner.rows,
            "cols_ptr": streamed.rows,
            "padded_rows": owner.padded,
            "padded_cols": streamed.padded,
            "own_offset": self.own_col if is_rows else self.own_row,
        }

    def weights(self, anchors: Anchors, peak: Tensor) -> tuple[Tensor, Tensor]:
        """(4, padded rows) what anchors weigh, and the factor that was taken out, 0-dim."""
        upstream, divisor, stats, _ = anchors
        num_rows = stats.shape[1]
        padded = triton_tiles.padded_rows(num_rows)
        weights, factor, stats = self.new((4, padded)), self.new(()), stats.contiguous()
        self.run(
            self.plan.weights(num_rows),
            upstream_ptr=upstream,
            peak_ptr=peak,
            count_ptr=divisor,
            stats_ptr=stats,
            weights_ptr=weights,
            factor_ptr=factor,
            num_rows=num_rows,
            padded_rows=padded,
            upstream_stride=upstream.stride(0) if upstream.ndim else 0,
            headroom=HEADROOM,
        )
        return weights, factor

    def products(
        self, of_rows: Tensor, of_cols: Tensor | None, uses_rows: bool, uses_cols: bool
    ) -> Iterator[tuple[Tensor, Shares]]:
        """H times the columns where rows are used, then Hᵀ times the rows where columns are, in pieces.

        Args:
            of_rows, of_cols: what the anchors among the rows weigh, and those among the columns, if any.
        """
        if self.plan.is_wide:
            yield from self.wide_products(of_rows, of_cols, uses_rows, uses_cols)
            return
        if uses_rows:
            yield self.pieces(of_rows, of_cols, of_columns=False)
        if uses_cols:
            yield self.pieces(of_rows, of_cols, of_columns=True)

    def wide_products(
        self, of_rows: Tensor, of_cols: Tensor | None, uses_rows: bool, uses_cols: bool
    ) -> Iterator[tuple[Tensor, Shares]]:
        """``products`` by blocks of H, each of which is made once."""
        plan, rows, cols = self.plan, self.rows, self.cols
        height, width = plan.blocks(workspace_bytes)
        block = rows.features.new_empty(height * width)
        by_rows: dict[int, Tensor] = {}  # by the first row
        by_cols: dict[int, Tensor] = {}
        for i in range(0, rows.padded, height):
            for j in range(0, cols.padded, width):
                h, w = min(height, rows.padded - i), min(width, cols.padded - j)
                for running in plan.running:
                    self.run(
                        plan.derivatives(running, h, w, both_anchor=of_cols is not None),
                        **self.pairs(rows),
                        row_weights_ptr=of_rows,
                        col_weights_ptr=of_rows if of_cols is None else of_cols,
                        derivatives_ptr=block,
                        first_row=i,
                        first_col=j,
                        padded_width=w,
                    )
                derivatives = block[: h * w].view(h, w)
                if uses_rows:
                    _add(by_rows, i, _product(derivatives, cols.matrix(self.padded_dim)[j : j + w]))
                if uses_cols:
                    _add(
                        by_cols, j, _product(derivatives.T, rows.matrix(self.padded_dim)[i : i + h])
                    )
        for sums in (by_rows, by_cols):
            if sums:
                yield torch.cat(tuple(sums.values())) if len(sums) > 1 else sums[0], WHOLE

    def pieces(
        self, of_rows: Tensor, of_cols: Tensor | None, *, of_columns: bool
    ) -> tuple[Tensor, Shares]:
        """H times the columns, or Hᵀ times the rows: H stays in registers."""
        plan, owner = self.plan, self.cols if of_columns else self.rows
        weights = [of_rows, of_rows if of_cols is None else of_cols][:: -1 if of_columns else 1]
        shares = plan.backward_shares(plan.running[0], of_columns=of_columns)
        slices = self.new((shares.max_pieces, owner.padded, self.padded_dim))
        for running in plan.running:
            self.run(
                plan.backward(running, of_columns=of_columns, both_anchor=of_cols is not None),
                **self.pairs(owner),
                **plan.backward_shares(running, of_columns=of_columns).arguments,
                row_weights_ptr=weights[0],
                col_weights_ptr=weights[1],
                slices_ptr=slices,
            )
        return slices, shares

    def gradient(
        self, owner: Side, pieces: Tensor, shares: Shares, factor: Tensor, wanted: Wanted
    ) -> tuple[Tensor, Tensor]:
        """The gradient of one side's features, and its rows' dot products with the prepared ones.

        Args:
            owner: the side.
            pieces, shares: as ``products`` has them.
            factor: what was taken out of the weights.
            wanted: the dot products are, where the temperature's gradient is.
        """
        plan = self.plan
        if self.soft is not None:
            triton_soft.add_attraction(self, owner, pieces)
        dtype = torch.float32 if wanted.unrounded else owner.features.dtype
        gradient = self.new(owner.features.shape, dtype)
        dots = self.new(owner.padded if wanted.temperature else 0, torch.float64)
        self.run(
            plan.gradient(owner.num_rows, dots=wanted.temperature, unrounded=wanted.unrounded),
            **owner.arguments(),
            **shares.arguments,
            slices_ptr=pieces,
            factor_ptr=factor,
            gradient_ptr=gradient,
            dots_ptr=dots,
            gradient_sample_stride=gradient.stride(0),
            gradient_view_stride=gradient.stride(1) if gradient.ndim == 3 else 0,
        )
        return gradient, dots

    # --- soft labels, which the kernels do not see

    def soft_of(self, owner: Side) -> tuple[SoftPositives, Side]:
        """The labels as a side's anchors see them, and the side of their contrasts."""
        assert self.soft is not None
        if owner is self.rows:
            return self.soft, self.cols
        return self.soft.mirrored(), self.rows


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, whatever the autocast of the caller is."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == torch.float32 or not a.is_cuda:
            return a.float() @ b.float()
        return accumulated(a, b)


def _occurrences(labels: Tensor, among: Tensor) -> Tensor:
    """(n,) int32: how often each label is among others."""
    among = among.sort().values
    begin, end = (torch.searchsorted(among, labels, out_int32=True, right=r) for r in (False, True))
    return end - begin


def _add(sums: dict[int, Tensor], at: int, product: Tensor) -> None:
    """Add to what is there, if anything is."""
    sums[at] = sums[at].add_(product) if at in sums else product


def _temperature(problem: Problem) -> Tensor | float:
    """The temperature as a number where the host may know it without waiting for the device."""
    tau = problem.temperature_tensor
    if tau is None:
        return problem.temperature
    if tau.device.type == "cpu":
        return float(tau)
    return tau.to(torch.float32)


def _target(device: torch.device) -> Target:
    if device.type != "cuda":
        return triton_tiles.INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    architecture = triton_tiles.architecture(properties.major, properties.minor)
    return Target(architecture, properties.multi_processor_count)
