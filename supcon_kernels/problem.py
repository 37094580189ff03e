"""One frozen description of a call: which rows are contrasted with which, and the weight of each pair.

Everything that the backends share about a call lives here: the working dtype, the
normalisation and its backward, and which pairs are positive, negative or ignored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SUMMATIONS = ("out", "in")
DENOMINATORS = ("all", "one_positive", "only_negatives")


@dataclasses.dataclass(frozen=True)
class Problem:
    """N anchor rows against M contrast columns; the fields are the operator's operands, in order.

    Attributes:
        rows: (N, D) anchors, or (B, V, D) of V views, which are N = V·B rows ordered view by view;
            float16, bfloat16, float32 or float64.
        cols: (M, D) or (B, V, D) contrasts; None where the rows are contrasted with each other
            (square, M = N).
        row_labels: (N,) or (B,) int64, or (N, C) or (B, C) float; None with ``weights``.
        col_labels: the same of the contrasts; None where square or with ``weights``.
        weights: (n, m) weight of each pair, repeated to (N, M) by index modulo (n, m):
            > 0 positive, 0 negative, < 0 ignored.
        temperature_tensor: 0-dim, overrides ``temperature`` where given.
        temperature: > 0.
        self_offset: column ``self_offset + i`` is anchor i itself and is left out; None: no such column.
        summation: one of ``SUMMATIONS``.
        denominator: one of ``DENOMINATORS``.
        normalize: L2-normalise rows and columns.
        ignore_index: the integer label of rows and columns that take no part.
        tf32: whether torch was told that a product of float32 on CUDA may be one of TF32.
        symmetric: the columns are anchors of the rows, too, and the loss is the mean of both ways'.
    """

    rows: Tensor
    cols: Tensor | None
    row_labels: Tensor | None
    col_labels: Tensor | None
    weights: Tensor | None
    temperature_tensor: Tensor | None
    temperature: float
    self_offset: int | None
    summation: str
    denominator: str
    normalize: bool
    ignore_index: int
    tf32: bool = False
    symmetric: bool = False

    def operands(self) -> tuple[Any, ...]:
        """The fields as a flat tuple: ``Problem(*problem.operands())`` is the same problem."""
        return tuple([getattr(self, name) for name in _FIELDS])

    @property
    def square(self) -> bool:
        """Whether the rows are contrasted with each other."""
        return self.cols is None

    @property
    def num_rows(self) -> int:
        """N."""
        return _num_rows(self.rows)

    @property
    def num_cols(self) -> int:
        """M."""
        return _num_rows(self.rows if self.cols is None else self.cols)

    def by_rows(self) -> Problem:
        """The same problem with rows (N, D) and cols (M, D), and a label for each."""
        if self.rows.ndim == 2 and (self.cols is None or self.cols.ndim == 2):
            return self
        cols, of_rows, of_cols = self.cols, self.row_labels, self.col_labels
        return Problem(
            _by_view(self.rows),
            None if cols is None else _by_view(cols),
            None if of_rows is None else _repeated(of_rows, self.rows),
            None if of_cols is None else _repeated(of_cols, cols),
            *self.operands()[4:],
        )

    def mirrored(self) -> Problem:
        """One way of a symmetric problem: the columns against the rows."""
        assert self.cols is not None and self.self_offset is None
        sides = (self.cols, self.rows, self.col_labels, self.row_labels)
        weights = None if self.weights is None else self.weights.T
        one_way = self.operands()[5:-1]
        return Problem(*sides, weights, *one_way)

    def ways(self) -> tuple[Problem, ...]:
        """The problems of one way each, whose mean loss this one's is."""
        if not self.symmetric:
            return (self,)
        one_way = self.operands()[:-1]
        return Problem(*one_way), self.mirrored()

    @property
    def dtype(self) -> torch.dtype:
        """The working dtype: float64 for float64 features, float32 for all others."""
        return working_dtype(self.rows)

    @property
    def tau(self) -> Tensor | float:
        """The temperature, as a tensor on the features' device where it was given as one."""
        if self.temperature_tensor is None:
            return self.temperature
        return self.temperature_tensor.to(self.rows.device, self.dtype)

    @property
    def has_integer_labels(self) -> bool:
        """Whether labels partition the samples into classes."""
        return self.row_labels is not None and self.row_labels.ndim == 1

    def row_ignored(self) -> Tensor:
        """(N,) bool: the anchor's label is ``ignore_index``."""
        return self._ignored(self.row_labels, self.rows)

    def col_ignored(self) -> Tensor:
        """(M,) bool: the contrast's label is ``ignore_index``."""
        if self.cols is None:
            return self.row_ignored()
        return self._ignored(self.col_labels, self.cols)

    def _ignored(self, labels: Tensor | None, embeddings: Tensor) -> Tensor:
        if labels is None or labels.ndim != 1:
            return torch.zeros(embeddings.shape[0], dtype=torch.bool, device=embeddings.device)
        return labels == self.ignore_index

    def reduced(self, loss: Tensor, contributes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (N,), its total (0-dim), and counts (2,), at least 1, in the working dtype.

        The counts are of the anchors that are not ignored, and of those that contribute (N,).
        """
        total = loss.sum(dtype=accumulation_dtype(loss)).to(self.dtype)
        is_anchor = ~self.row_ignored()
        counts = torch.stack((is_anchor.sum(), contributes.sum())).clamp(min=1)
        return loss, total, counts.to(self.dtype)

    def embeddings(self) -> tuple[Tensor, Tensor]:
        """Rows (N, D) and columns (M, D) in the working dtype, normalised if asked, ignored ones zero."""
        rows = self._embed(self.rows, self.row_ignored())
        return rows, rows if self.cols is None else self._embed(self.cols, self.col_ignored())

    def _embed(self, x: Tensor, ignored: Tensor) -> Tensor:
        x = x.to(self.dtype).masked_fill(ignored[:, None], 0.0)
        return normalize(x) if self.normalize else x

    def poison(self) -> Tensor:
        """0-dim: 0, or NaN where a row or column that takes part is not finite, or ``target_poison`` is."""
        poison = (self.rows.to(self.dtype).masked_fill(self.row_ignored()[:, None], 0.0) * 0).sum()
        if self.cols is not None:
            cols = self.cols.to(self.dtype).masked_fill(self.col_ignored()[:, None], 0.0)
            poison = poison + (cols * 0).sum()
        return poison.detach() + self.target_poison()

    def target_poison(self) -> Tensor:
        """0-dim: 0, or NaN where soft labels are negative, or they or a mask are not finite.

        Validation refuses such values where the host may read them.
        """
        poison = torch.zeros((), dtype=self.dtype, device=self.rows.device)
        for x in (self.row_labels, self.col_labels, self.weights):
            if x is not None and x.is_floating_point() and x.numel():
                lowest, highest = torch.aminmax(x)
                wrong = ~(lowest.isfinite() & highest.isfinite())
                if x is not self.weights:
                    wrong = wrong | (lowest < 0)
                poison = poison.masked_fill(wrong, torch.nan)
        return poison

    def pair_weights(self, start: int, stop: int) -> Tensor:
        """(stop - start, M) weights of anchors start…stop-1: > 0 positive, 0 negative, < 0 ignored.

        Soft labels weigh a pair by their dot product, in float64 where the device has it:
        it underflows in float32 where labels are nearly one-hot.
        """
        if self.weights is not None:
            w = self._repeated_weights(start, stop)
        else:
            assert self.row_labels is not None
            of_row = self.row_labels[start:stop]
            of_col = self.row_labels if self.cols is None else self.col_labels
            assert of_col is not None
            if of_row.ndim == 1:
                w = (of_row[:, None] == of_col[None, :]).to(self.dtype)
            else:
                exact = accumulation_dtype(of_row)
                w = of_row.to(exact) @ of_col.to(exact).T
        w = w.masked_fill(self.col_ignored()[None, :], -1.0)
        w = w.masked_fill(self.row_ignored()[start:stop, None], -1.0)
        if self.self_offset is not None:
            w.diagonal(self.self_offset + start).fill_(-1.0)
        return w

    def _repeated_weights(self, start: int, stop: int) -> Tensor:
        assert self.weights is not None
        n, m = self.weights.shape
        row = torch.arange(start, stop, device=self.weights.device) % max(n, 1)
        w = self.weights[row]
        # The sign of a weight is read before anything could round it to zero.
        w = w.to(accumulation_dtype(w) if w.is_floating_point() else self.dtype)
        return w.repeat(1, self.num_cols // m) if m else w


_TYPES = {field.name: str(field.type) for field in dataclasses.fields(Problem)}
_FIELDS = tuple(_TYPES)
NUM_FIELDS = len(_FIELDS)
# The operands as torch.library declares them. Tensors come first.
SCHEMA = ", ".join(
    f"{type_.replace(' | None', '?').replace('int?', 'SymInt?')} {name}"
    for name, type_ in _TYPES.items()
)
NUM_TENSORS = sum("Tensor" in type_ for type_ in _TYPES.values())
# Where the operands are that may have a gradient, in the order of ``Wanted`` and ``Gradients``.
DIFFERENTIABLE = tuple(map(_FIELDS.index, ("rows", "cols", "temperature_tensor")))


def as_asked(loss: Tensor, total: Tensor, counts: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """The loss that was asked for, and what the sum of the anchors' losses was divided by, 0-dim.

    Args:
        loss, total, counts: as ``Problem.reduced`` has them.
        reduction: as in ``supcon_loss``.
    """
    if reduction in ("none", "sum"):
        return loss if reduction == "none" else total, loss.new_ones(())
    count = counts[0 if reduction == "mean" else 1]
    return total / count, count


def mean_of_ways(losses: Sequence[Tensor]) -> Tensor:
    """The loss of a problem, given those of its ``ways``."""
    return losses[0] if len(losses) == 1 else (losses[0] + losses[1]) / 2


def _num_rows(x: Tensor) -> int:
    return x.shape[0] if x.ndim == 2 else x.shape[0] * x.shape[1]


def _by_view(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.transpose(0, 1).flatten(0, 1)


def by_sample(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient (N, D) of ``by_rows`` in the shape of the features ``x``."""
    if x.ndim == 2:
        return gradient
    batch, views, dim = x.shape
    return gradient.view(views, batch, dim).transpose(0, 1).contiguous()


def _repeated(labels: Tensor, x: Tensor | None) -> Tensor:
    """The labels of the samples of ``x`` once for each view."""
    if x is None or x.ndim == 2:
        return labels
    return labels.repeat(x.shape[1], *[1] * (labels.ndim - 1))


def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which ``x`` is computed with: float64 stays, everything else is float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of what the forward hands the backward, a few numbers for each row."""
    return accumulation_dtype(x)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float64, except on MPS, which has none."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _unit_scale(x: Tensor) -> Tensor:
    """(N, 1) largest magnitude of each row, 1 for zero rows: divided by it, no norm over- or underflows."""
    if x.shape[1] == 0:
        return x.new_ones(x.shape[0], 1)
    largest = x.detach().abs().amax(dim=1, keepdim=True)
    return torch.where(largest == 0, torch.ones_like(largest), largest)


def normalize(x: Tensor) -> Tensor:
    """Each row of ``x`` (N, D) divided by its L2 norm; a zero row stays zero and has zero gradient."""
    zero = (x.detach() == 0).all(dim=1, keepdim=True)
    scaled = torch.where(zero, torch.zeros_like(x), x / _unit_scale(x))
    square = scaled.square().sum(dim=1, keepdim=True)
    return scaled / torch.where(zero, torch.ones_like(square), square).sqrt()


def normalize_backward(x: Tensor, grad: Tensor) -> Tensor:
    """Gradient of ``x`` (N, D), given the gradient of ``normalize(x)``."""
    scale = _unit_scale(x)
    scaled = x / scale
    norm = scaled.square().sum(dim=1, keepdim=True).sqrt()
    unit = scaled / norm
    tangent = grad - unit * (unit * grad).sum(dim=1, keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), tangent / norm / scale)
