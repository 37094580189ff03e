"""Positives of soft labels in the default loss, by sums over soft classes: no look at each pair.

The weight of a pair is y_i·y_j, so Σ_j w_ij v_j is y_i times the sums Σ_j y_jᵀ v_j. A row itself is
left out of these sums. It is not subtracted from them: if its labels are nearly one-hot, only
rounding errors would be left. All of this is in float64, and costs O(N·C·(C + D)) for C classes.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from supcon_kernels.problem import Problem

# Rows of a block whose pairs are looked at; as many as there are classes, if these are more.
MIN_BLOCK = 128


def weighted_sums(of_rows: Tensor, of_cols: Tensor, vectors: Tensor, offset: int | None) -> Tensor:
    """(N, K) Σ_j (y_i·y_j) v_j over all columns j but row i itself.

    The rows that are columns are cut into blocks. A block takes the class sums of all other blocks,
    and looks at the pairs within it, without those of a row with itself.

    Args:
        of_rows, of_cols: (N, C) and (M, C) soft labels y.
        vectors: (M, K) v.
        offset: column ``offset + i`` is row i itself, where there is such a column; None: no column is.
    """
    first_row, first_col = max(-(offset or 0), 0), max(offset or 0, 0)
    num_own = min(len(of_rows) - first_row, len(of_cols) - first_col)
    if offset is None or num_own <= 0:
        return of_rows @ (of_cols.T @ vectors)
    row_parts, col_parts, vector_parts = (
        x.split((first, num_own, len(x) - first - num_own))
        for x, first in ((of_rows, first_row), (of_cols, first_col), (vectors, first_col))
    )
    y, x, v = (
        _blocks(parts[1], of_rows.shape[1]) for parts in (row_parts, col_parts, vector_parts)
    )
    pairs = y @ x.mT
    pairs.diagonal(dim1=1, dim2=2).zero_()
    own = pairs @ v
    sums, outside = x.mT @ v, None
    for of_part, part in zip(col_parts[::2], vector_parts[::2]):
        if len(part):
            outside = of_part.T @ part if outside is None else outside + of_part.T @ part
    if len(sums) > 1:
        is_other = sums.new_ones(len(sums), len(sums)).fill_diagonal_(0.0)
        own = own + y @ (is_other @ sums.flatten(1)).view_as(sums)
    if outside is not None:
        own = own + y @ outside
    own = own.flatten(0, 1)[:num_own]
    if num_own == len(of_rows):
        return own
    total = sums.sum(dim=0) if outside is None else sums.sum(dim=0) + outside
    return torch.cat([row_parts[0] @ total, own, row_parts[2] @ total])


def _blocks(x: Tensor, num_classes: int) -> Tensor:
    """The rows of ``x`` (n, K) in blocks (…, size, K), with zeros behind the last."""
    size = min(max(num_classes, MIN_BLOCK), len(x))
    if rest := len(x) % size:
        x = F.pad(x, (0, 0, 0, size - rest))
    return x.view(-1, size, x.shape[1])


@dataclasses.dataclass(frozen=True)
class SoftPositives:
    """Both sides' soft labels (N, C) and (M, C) in float64, and the column that is row 0 itself, if any."""

    of_rows: Tensor
    of_cols: Tensor
    offset: int | None

    @staticmethod
    def of(problem: Problem) -> SoftPositives:
        """Those of ``problem``, whose labels are soft."""
        of_rows = _by_row(problem.row_labels, problem.num_rows)
        of_cols = of_rows
        if not problem.square:
            of_cols = _by_row(problem.col_labels, problem.num_cols)
        return SoftPositives(of_rows, of_cols, problem.self_offset)

    def mirrored(self) -> SoftPositives:
        """The same with the columns as rows."""
        offset = None if self.offset is None else -self.offset
        return SoftPositives(self.of_cols, self.of_rows, offset)

    def means(self, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's product with the weighted mean of its positives, and their total weight (N,).

        Args:
            rows, cols: (N, D) and (M, D).
        """
        cols = torch.cat([cols.double(), cols.new_ones(len(cols), 1, dtype=torch.float64)], dim=1)
        sums = weighted_sums(self.of_rows, self.of_cols, cols, self.offset)
        total = sums[:, -1]
        products = (rows.double() * sums[:, :-1]).sum(dim=1)
        return products / torch.where(total == 0, 1.0, total), total

    def attraction(self, of_rows: Tensor | None, of_cols: Tensor | None, cols: Tensor) -> Tensor:
        """(N, D) Σ_j w_ij (a_i + b_j) c_j over the columns c (M, D).

        Args:
            of_rows, of_cols: a (N,) and b (M,) in float64: an anchor's gradient over the weight of
                its positives. None: that side has no anchors.
            cols: (M, D).
        """
        cols = cols.double()
        vectors = [] if of_rows is None else [cols]
        if of_cols is not None:
            vectors.append(cols * of_cols[:, None])
        sums = weighted_sums(self.of_rows, self.of_cols, torch.cat(vectors, dim=1), self.offset)
        parts = list(sums.split(cols.shape[1], dim=1))
        if of_rows is not None:
            parts[0] = parts[0] * of_rows[:, None]
        attraction: Tensor = sum(parts[1:], parts[0])
        return attraction


def _by_row(labels: Tensor | None, num_rows: int) -> Tensor:
    """The labels of samples in float64, once for each of their views."""
    assert labels is not None
    labels = labels.double()
    return labels if num_rows == len(labels) else labels.repeat(num_rows // len(labels), 1)
