"""The same mathematics in chunks of rows, plain PyTorch: any device, memory O(N·(D + chunk)).

The forward keeps O(N) statistics; the backward recomputes the similarities of each chunk and
accumulates G·cols into the rows' gradient and Gᵀ·rows into the columns'. With the default loss
and integer labels the positives cost O(N·D), by sums over each class, and the tile loop is a
softmax over everything but the anchor itself, without a look at the labels.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from supcon_kernels import partial_sums
from supcon_kernels.backends.protocol import Anchors, Made, Results, Wanted
from supcon_kernels.backends.reference import masked_logsumexp
from supcon_kernels.problem import (
    Problem,
    accumulation_dtype,
    by_sample,
    normalize_backward,
    statistics_dtype,
)
from supcon_kernels.products import add_product, product, product_in_parts, short_dtype

# Similarities in flight at a time: 4 MiB of float32 stay in a CPU's cache; elsewhere 128 MiB, so
# that a chunk is work enough for the device.
CPU_CHUNK_PAIRS, DEVICE_CHUNK_PAIRS = 1 << 20, 1 << 25
MIN_CHUNK, MAX_CHUNK = 32, 2048


def unavailable() -> str | None:
    """Why this backend cannot run on this machine, in one sentence; None: it can."""
    return None


def why_not(problem: Problem) -> str | None:
    """Why this backend cannot take ``problem``, in one sentence; None: it can."""
    return None


def saved(problem: Problem) -> tuple[Tensor, Tensor]:
    """Statistics (3, N), and nothing prepared.

    The statistics of a row are the log-sum-exp of its denominator, the normaliser of its
    positives (their total weight, or the log-sum-exp over them), and the weight of the softmax
    part of its gradient.
    """
    stats = problem.rows.new_empty(3, problem.num_rows, dtype=statistics_dtype(problem.rows))
    return stats, problem.rows.new_empty(0)


def forward(problem: Problem, reduction: str) -> Results:
    """The loss. Both ways share the similarities, unless positives are looked at once more."""
    problem = problem.by_rows()
    ways = problem.ways()
    looks = ways if problem.denominator == "one_positive" else [problem]
    sums = itertools.chain.from_iterable(map(_sums, looks))
    return Results.of_ways([_results(*of_way, reduction) for of_way in zip(ways, sums)])


def forward_of_some(problem: Problem, negatives: Tensor | None = None) -> tuple[Results, Tensor]:
    """The loss of each row, and the sums of columns that have other contrasts besides."""
    one_way, other_way = problem.ways()
    of_rows, of_cols = _sums(problem, negatives)
    poisoned = of_cols + other_way.poison()
    of_cols = torch.where(other_way.row_ignored(), of_cols, poisoned)
    return _results(one_way, of_rows, "none"), of_cols


def _results(problem: Problem, sums: Tensor, reduction: str) -> Results:
    loss = partial_sums.losses(problem, sums) + problem.poison()
    loss = torch.where(problem.row_ignored(), 0.0, loss)
    losses = problem.reduced(loss, partial_sums.contributes(problem, sums))
    return Results.of(losses, statistics_of(problem, sums), reduction)


def _sums(problem: Problem, negatives: Tensor | None = None) -> tuple[Tensor, ...]:
    """Sums of the rows, then, of a symmetric problem, those of the columns, given their negatives."""
    rows, cols = _embeddings(problem)
    with torch.autocast(rows.device.type, enabled=False):
        if not _positives_by_class(problem):
            return _pair_sums(problem, rows, cols, negatives)
        lses = _log_sum_exps(problem, rows, cols)
        ways = zip(problem.ways(), ((rows, cols), (cols, rows)), lses)
        return tuple([_class_sums(way, *sides, lse) for way, sides, lse in ways])


def statistics_of(problem: Problem, sums: Tensor) -> Tensor:
    """The statistics, given the sums over all contrasts."""
    lse, of_positives, total = sums[:3]
    normaliser = total if problem.summation == "out" else of_positives
    stats = torch.stack((lse, normaliser, partial_sums.softmax_weights(problem, sums)))
    # Infinite, they make every probability of an idle anchor zero.
    stats[:2].masked_fill_(~partial_sums.contributes(problem, sums), torch.inf)
    return stats.to(statistics_dtype(problem.rows))


def backward(
    problem: Problem, anchors: Anchors, col_anchors: Anchors | None, wanted: Wanted
) -> Made:
    """The gradients, of similarities that are computed again."""
    given, problem = problem, problem.by_rows()
    rows, cols = _embeddings(problem)
    wants_cols = wanted.cols or (wanted.rows and problem.square)
    gradient = _class_gradient if _positives_by_class(problem) else _pair_gradient
    of_cols = None if col_anchors is None else _Weighted.of(col_anchors)
    with torch.autocast(rows.device.type, enabled=False):
        grad_rows, grad_cols = gradient(
            problem, rows, cols, _Weighted.of(anchors), of_cols, wants_cols
        )

    out_rows = out_cols = grad_tau = None
    dtype = problem.dtype if wanted.unrounded else problem.rows.dtype
    if wanted.temperature:
        exact = accumulation_dtype(rows)
        grad_tau = -(rows.to(exact) * grad_rows.to(exact)).sum().to(rows.dtype) / problem.tau
        if of_cols is not None and not problem.symmetric:
            grad_tau = grad_tau / 2  # every pair is in the gradient of both its rows
    if problem.square and wanted.rows:
        grad_rows += grad_cols
    if wanted.rows:
        of_input = _to_input(problem, problem.rows, grad_rows).to(dtype)
        out_rows = by_sample(of_input, given.rows)
    if wanted.cols:
        assert problem.cols is not None and given.cols is not None
        of_input = _to_input(problem, problem.cols, grad_cols).to(dtype)
        out_cols = by_sample(of_input, given.cols)
    return Made(out_rows, out_cols, grad_tau)


@dataclasses.dataclass(frozen=True)
class _Weighted:
    """What is known of anchors in the backward.

    Attributes:
        grad_loss: (n,) gradient of their losses, 0 where they do not contribute.
        stats: (3, n) from the forward.
    """

    grad_loss: Tensor
    stats: Tensor

    @staticmethod
    def of(given: Anchors) -> _Weighted:
        grad_loss = torch.where(given.stats[1] == torch.inf, 0.0, given.grad_losses())
        return _Weighted(grad_loss, given.stats)

    def chunk(self, start: int, stop: int) -> _Weighted:
        return _Weighted(self.grad_loss[start:stop], self.stats[:, start:stop])


def _to_input(problem: Problem, x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the input ``x``, given that of its embedding."""
    ignored = problem.row_ignored() if x is problem.rows else problem.col_ignored()
    if problem.normalize:
        grad = normalize_backward(x.to(grad.dtype), grad)
    return grad.masked_fill(ignored[:, None], 0.0)


def _embeddings(problem: Problem) -> tuple[Tensor, Tensor]:
    """``problem.embeddings()``, rounded to 16 bits where they are multiplied in these."""
    rows, cols = problem.embeddings()
    if (dtype := short_dtype(problem.rows)) is None:
        return rows, cols
    rounded = rows.to(dtype).to(rows.dtype)
    return rounded, rounded if problem.square else cols.to(dtype).to(cols.dtype)


def _chunks(problem: Problem) -> Iterator[tuple[int, int]]:
    n = problem.rows.shape[0]
    pairs = CPU_CHUNK_PAIRS if problem.rows.device.type == "cpu" else DEVICE_CHUNK_PAIRS
    size = min(max(pairs // max(problem.num_cols, 1), MIN_CHUNK), MAX_CHUNK)
    for start in range(0, n, size):
        yield start, min(start + size, n)


# --- any variant, any labels: the weight of every pair of a chunk is looked at


def _pair_sums(
    problem: Problem, rows: Tensor, cols: Tensor, negatives: Tensor | None
) -> tuple[Tensor, ...]:
    of_rows, of_cols = (partial_sums.over_nothing(problem, x) for x in (rows, cols))
    dtype = short_dtype(problem.rows)
    for start, stop in _chunks(problem):
        s = product(rows[start:stop], cols.T, dtype) / problem.tau
        w = problem.pair_weights(start, stop)
        of_rows[:, start:stop] = _chunk_sums(problem, s, w)
        if problem.symmetric:
            of_chunk = _chunk_sums(problem, s.T, w.T, negatives)
            of_cols = partial_sums.merged(problem, (of_cols, of_chunk))
    return (of_rows, of_cols) if problem.symmetric else (of_rows,)


def _chunk_sums(problem: Problem, s: Tensor, w: Tensor, negatives: Tensor | None = None) -> Tensor:
    """Sums of anchors with similarities ``s`` (n, M) and pair weights ``w`` (n, M).

    For "one_positive" ``negatives`` (n,) is their log-sum-exp, if these are not all contrasts.
    """
    below = w >= 0 if problem.denominator == "all" else w == 0
    lse = _log_sum_exp(s, below) if negatives is None else negatives.to(s.dtype)
    logits, positive, weight = [s], w > 0, w.clamp(min=0.0)
    if problem.denominator == "one_positive":
        log_q = F.logsigmoid(s - lse[:, None])
        rest = F.logsigmoid(lse[:, None] - s).clamp_(min=torch.finfo(s.dtype).min / 4)
        logits = [log_q, rest.exp_() if problem.summation == "out" else rest.add_(log_q)]
    if problem.summation == "out":
        of_positives = [(weight * x).sum(dim=1) for x in logits]
    else:
        log_weight = torch.where(positive, w, 1.0).log()
        of_positives = [_log_sum_exp(x + log_weight, positive) for x in logits]
    found = (lse, of_positives[0], weight.sum(dim=1), *of_positives[1:])
    return torch.stack([x.to(accumulation_dtype(s)) for x in found])


def _log_sum_exp(x: Tensor, mask: Tensor) -> Tensor:
    return masked_logsumexp(x, mask).masked_fill(~mask.any(dim=1), -torch.inf)


def _attraction(problem: Problem, s: Tensor, w: Tensor, lse: Tensor, normaliser: Tensor) -> Tensor:
    """(n, M) pull of each positive, minus the derivative of the loss by s without the softmax part."""
    one_positive = problem.denominator == "one_positive"
    if problem.summation == "out":
        pull = w / normaliser[:, None]
    else:
        logit = F.logsigmoid(s - lse[:, None]) if one_positive else s
        pull = w * (logit - normaliser[:, None]).exp()
    if one_positive:
        pull = pull * (lse[:, None] - s).sigmoid()
    return torch.where(w > 0, pull, 0.0)


def _derivative(problem: Problem, s: Tensor, w: Tensor, anchors: _Weighted) -> Tensor:
    """(n, M) derivative of the total loss of anchors by their similarities ``s``, over τ."""
    lse, _, softmax_weight = anchors.stats.to(s.dtype)
    normaliser = anchors.stats[1].to(w.dtype)  # of weights that may be tiny or huge
    softmax = softmax_weight[:, None] * (s - lse[:, None]).exp()
    softmax = torch.where(w >= 0 if problem.denominator == "all" else w == 0, softmax, 0.0)
    g = softmax - _attraction(problem, s, w, lse, normaliser)
    return (g * (anchors.grad_loss[:, None] / problem.tau)).to(s.dtype)


def _pair_gradient(
    problem: Problem,
    rows: Tensor,
    cols: Tensor,
    anchors: _Weighted,
    col_anchors: _Weighted | None,
    wants_cols: bool,
) -> tuple[Tensor, Tensor]:
    grad_rows = torch.empty_like(rows)
    grad_cols = torch.zeros_like(cols) if wants_cols else rows.new_zeros(0)
    dtype = short_dtype(problem.rows)
    for start, stop in _chunks(problem):
        chunk = slice(start, stop)
        s = product(rows[chunk], cols.T, dtype) / problem.tau
        w = problem.pair_weights(start, stop)
        g = _derivative(problem, s, w, anchors.chunk(start, stop))
        if col_anchors is not None:
            g = g + _derivative(problem, s.T, w.T, col_anchors).T
        grad_rows[chunk] = product_in_parts(g, cols, dtype)
        if wants_cols:
            add_product(grad_cols, g.T, rows[chunk], dtype)
    return grad_rows, grad_cols


# --- out/all with integer labels: positives by class sums, no label in the tile loop


def _positives_by_class(problem: Problem) -> bool:
    """Soft labels are left to the pairs: their class sums cancel where labels are nearly one-hot."""
    default = problem.summation == "out" and problem.denominator == "all"
    return default and problem.has_integer_labels


@dataclasses.dataclass(frozen=True)
class _Classes:
    """Labels as consecutive class numbers; ignored rows and columns carry weight zero.

    There is room for a class for every row and column: to count the classes, the host would wait
    for the device.
    """

    of_row: Tensor  # (N,)
    of_col: Tensor  # (M,)
    row_counts: Tensor  # (N,) 1, or 0 where ignored
    col_counts: Tensor  # (M,) 1, or 0 where ignored

    @staticmethod
    def of(problem: Problem) -> _Classes:
        row_labels = problem.row_labels
        assert row_labels is not None
        col_labels = row_labels[:0] if problem.cols is None else problem.col_labels
        assert col_labels is not None
        labels, order = torch.cat((row_labels, col_labels)).sort()
        is_new = torch.zeros_like(labels)
        is_new[1:] = labels[1:] != labels[:-1]
        classes = torch.empty_like(labels).scatter_(0, order, is_new.cumsum(0))
        of_row = classes[: len(row_labels)]
        exact = accumulation_dtype(problem.rows)
        return _Classes(
            of_row,
            of_row if problem.cols is None else classes[len(row_labels) :],
            (~problem.row_ignored()).to(exact),
            (~problem.col_ignored()).to(exact),
        )

    @property
    def num_classes(self) -> int:
        """An upper bound."""
        return len(self.of_row) + (0 if self.of_col is self.of_row else len(self.of_col))

    def row_sums(self, x: Tensor) -> Tensor:
        """(num_classes, …) sums over the rows of each class of ``x`` (N, …)."""
        return x.new_zeros(self.num_classes, *x.shape[1:]).index_add_(0, self.of_row, x)

    def col_sums(self, x: Tensor) -> Tensor:
        """(num_classes, …) sums over the columns of each class of ``x`` (M, …)."""
        return x.new_zeros(self.num_classes, *x.shape[1:]).index_add_(0, self.of_col, x)


def _own(problem: Problem, classes: _Classes) -> tuple[slice, slice, Tensor] | None:
    """Rows, the columns that they themselves are, and (n, 1) 1 where such a column is in its class.

    It is not where a memory holds the anchor under another label, or ignores it.
    """
    offset = problem.self_offset
    if offset is None:
        return None
    rows = slice(max(-offset, 0), problem.rows.shape[0])
    cols = slice(rows.start + offset, rows.stop + offset)
    same = classes.of_col[cols] == classes.of_row[rows]
    return rows, cols, (same * classes.col_counts[cols])[:, None]


def _softmax_chunks(problem: Problem, rows: Tensor, cols: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Similarities (n, M) of each chunk of rows; minus infinity where the column takes no part."""
    bias = cols.new_zeros(cols.shape[0]).masked_fill_(problem.col_ignored(), float("-inf"))
    dtype = short_dtype(problem.rows)
    scaled = rows / problem.tau
    for start, stop in _chunks(problem):
        if dtype is None:
            s = torch.addmm(bias, scaled[start:stop], cols.T)
        else:
            s = product(rows[start:stop], cols.T, dtype).div_(problem.tau).add_(bias)
        if problem.self_offset is not None:
            s.diagonal(problem.self_offset + start).fill_(float("-inf"))
        yield slice(start, stop), s


def _log_sum_exps(problem: Problem, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp (N,) of each row and, where the problem is symmetric, (M,) of each column."""
    lse = rows.new_empty(rows.shape[0])
    num_cols = cols.shape[0] if problem.symmetric else 0
    col_lse = rows.new_full((num_cols,), -torch.inf, dtype=accumulation_dtype(rows))
    ignored = problem.row_ignored()
    for chunk, s in _softmax_chunks(problem, rows, cols):
        lse[chunk] = s.logsumexp(dim=1)
        if problem.symmetric:
            of_chunk = s.masked_fill_(ignored[chunk, None], -torch.inf).logsumexp(dim=0)
            col_lse = torch.logaddexp(col_lse, of_chunk.to(col_lse.dtype))
    return lse, col_lse.to(rows.dtype)


def _class_sums(problem: Problem, rows: Tensor, cols: Tensor, lse: Tensor) -> Tensor:
    classes = _Classes.of(problem)
    exact = accumulation_dtype(rows)
    counts = classes.col_sums(classes.col_counts)[classes.of_row]
    sums = classes.col_sums(cols.to(exact))[classes.of_row]
    if (found := _own(problem, classes)) is not None:
        own_rows, own_cols, in_class = found
        counts[own_rows] -= in_class[:, 0]
        sums[own_rows] -= in_class * cols[own_cols]
    of_positives = (rows.to(exact) * sums).sum(dim=1) / problem.tau
    return torch.stack((lse.to(exact), of_positives, counts * classes.row_counts))


def _class_gradient(
    problem: Problem,
    rows: Tensor,
    cols: Tensor,
    anchors: _Weighted,
    col_anchors: _Weighted | None,
    wants_cols: bool,
) -> tuple[Tensor, Tensor]:
    grad_loss, lse = anchors.grad_loss, anchors.stats[0].to(rows.dtype)
    exact = accumulation_dtype(rows)
    classes = _Classes.of(problem)
    # Positives pull by the row's weight and by the column's, where this is an anchor, too.
    pull = (grad_loss / anchors.stats[1]).to(exact)[:, None]
    col_pull = None
    if col_anchors is not None:
        col_pull = (col_anchors.grad_loss / col_anchors.stats[1]).to(exact)[:, None]
    of_self = None
    if (found := _own(problem, classes)) is not None:
        own_rows, own_cols, in_class = found
        of_self = in_class * (pull[own_rows] + (0 if col_pull is None else col_pull[own_cols]))

    attraction = pull * classes.col_sums(cols.to(exact))[classes.of_row]
    if col_pull is not None:
        attraction += classes.col_sums(col_pull * cols)[classes.of_row]
    if of_self is not None:
        attraction[own_rows] -= of_self * cols[own_cols]
    grad_rows, grad_cols = -attraction.to(rows.dtype), rows.new_zeros(0)
    if wants_cols:
        attraction = classes.row_sums(pull * rows)[classes.of_col]
        if col_pull is not None:
            attraction += col_pull * classes.row_sums(rows.to(exact))[classes.of_col]
        if of_self is not None:
            attraction[own_cols] -= of_self * rows[own_rows]
        grad_cols = -attraction.to(rows.dtype)

    weighted = grad_loss[:, None] * rows
    dtype = short_dtype(problem.rows)
    for chunk, s in _softmax_chunks(problem, rows, cols):
        if col_anchors is not None:
            of_cols = (s - col_anchors.stats[0].to(s.dtype)).exp_().mul_(col_anchors.grad_loss)
        p = s.sub_(lse[chunk, None]).exp_()
        if col_anchors is None and dtype is None:
            grad_rows[chunk] += grad_loss[chunk, None] * (p @ cols)
            if wants_cols:
                grad_cols.addmm_(p.T, weighted[chunk])
            continue
        if col_anchors is None:
            g = p.mul_(grad_loss[chunk, None])
        else:
            g = of_cols.addcmul_(grad_loss[chunk, None], p)
        grad_rows[chunk] += product_in_parts(g, cols, dtype)
        if wants_cols:
            add_product(grad_cols, g.T, rows[chunk], dtype)
    grad_rows /= problem.tau
    if wants_cols:
        grad_cols /= problem.tau
    return grad_rows, grad_cols
