"""The symmetric loss over the rows of every rank of a process group, and its gradient.

Each rank has its rows against all columns, and its columns against all rows. With everybody's
statistics each side's gradient is that of rows whose columns are anchors, too: one product, of
the own rows or columns with all of the other side, and nothing is sent in the backward.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from supcon_kernels import op
from supcon_kernels.backends.protocol import Anchors, Gradients, Results, Wanted
from supcon_kernels.problem import NUM_TENSORS, Problem, accumulation_dtype
from supcon_kernels.ranks import Membership


class BothWays(torch.autograd.Function):
    """The loss of all ranks' rows and columns, whose gradient is of this rank's, times the ranks.

    Its arguments are the operands of the rank's own problem, the ranks' parts in the call, the
    rank's membership, the backend and the reduction.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """The reduced loss, the same bits on every rank."""
        *operands, parts, membership, backend, reduction = arguments
        problem = Problem(*operands)
        gathered = gathered_sides(problem, membership, parts)
        loss, (count, *saved) = loss_and_saved(
            problem, gathered, parts, membership, backend, reduction
        )
        ctx.save_for_backward(count, *saved, *gathered, *operands[:NUM_TENSORS])
        ctx.options = operands[NUM_TENSORS:]
        ctx.backend, ctx.num_ranks = backend, membership.size
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the rank's rows and columns, and its part of the temperature's."""
        count, *saved = ctx.saved_tensors
        inputs = saved[10:]
        weights = grad * (ctx.num_ranks / count).to(grad.dtype)
        problem = Problem(*inputs, *ctx.options)
        wanted = op.wanted_of(ctx)
        grads = gradients(problem, saved[6:10], weights, saved[:6], wanted, ctx.backend)
        return op.by_operand(ctx, grads, inputs)


def loss_and_saved(
    problem: Problem,
    gathered: Sequence[Tensor],
    parts: Sequence[Any],
    membership: Membership,
    backend: str,
    reduction: str,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The reduced loss, and for ``gradients`` the counts (2,) that the sums were divided by, the
    statistics and what is prepared of each way, and the statistics of all rows and of all columns.
    """
    ways = _against_all(problem, gathered)
    found = [op.results_of(way, backend, "none") for way in ways]
    sums = torch.cat([sums_of(way, of_way) for way, of_way in zip(ways, found)])
    of_all = gathered_stats([of_way.stats for of_way in found], parts, membership, sums)
    # In the order of the ranks, so that all have the same bits.
    totals, *counts = functools.reduce(torch.add, of_all[0]).view(2, 3).unbind(1)
    count = 2 * count_of(reduction, *counts)
    of_ways = [x for of_way in found for x in (of_way.stats, of_way.prepared)]
    mean: Tensor = (totals / count).sum().to(found[0].loss.dtype)
    return mean, (count, *of_ways, *of_all[1])


def gathered_stats(
    stats: Sequence[Tensor], parts: Sequence[Any], membership: Membership, sums: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """The sums of every rank, and the statistics of all rows and of all columns, this rank's first."""
    lengths = [[part.num_rows for part in parts], [part.num_cols for part in parts]]
    is_needed = any(part.needs for part in parts)
    sent = [(sums, [len(sums)] * membership.size)]
    for of_way, of_ranks in zip(stats, lengths):
        sent.append((of_way.T, of_ranks if is_needed else [0] * membership.size))
    sums_by_rank, *stats_by_side = membership.gather(sent)
    return sums_by_rank, [membership.own_first(xs).T.contiguous() for xs in stats_by_side]


def gradients(
    problem: Problem,
    gathered: Sequence[Tensor],
    weights: Tensor,
    saved: Sequence[Any],
    wanted: Wanted,
    backend: str,
) -> Gradients:
    """Gradients of this rank's rows, columns and temperature.

    Args:
        problem: this rank's own.
        gathered: as ``gathered_sides`` has them.
        weights: (2,) gradients of the sums of the rows' losses and of the columns'.
        saved: what ``loss_and_saved`` saved, without the count.
        wanted: which gradients.
        backend: made the statistics.
    """
    of_ways, all_stats = (saved[:2], saved[2:4]), saved[4:6]
    one, grad_tau = torch.ones_like(weights[0]), torch.zeros_like(weights[0])
    by_side: list[Tensor] = []
    for side, way in enumerate(_against_all(problem, gathered)):
        needs = Wanted(rows=wanted[side], temperature=wanted.temperature)
        own_weight = weights[side].expand(way.num_rows)
        other_weight = weights[1 - side].expand(way.num_cols)
        anchors = Anchors(own_weight, one, *of_ways[side])
        others = Anchors(other_weight, one, all_stats[1 - side])
        if any(needs):
            grads = op.gradients_of(way, anchors, others, needs, backend)
            by_side.append(grads.rows)
            if wanted.temperature:
                grad_tau = grad_tau + grads.temperature
        else:
            by_side.append(problem.rows.new_empty(0))
    return Gradients(by_side[0], by_side[1], grad_tau)


def sums_of(problem: Problem, found: Results) -> Tensor:
    """(3,) of the rank's anchors: their losses, how many there are, and how many contribute."""
    of_anchors = (found.loss, ~problem.row_ignored(), found.stats[1] != torch.inf)
    return torch.stack([x.sum(dtype=accumulation_dtype(found.loss)) for x in of_anchors])


def count_of(reduction: str, num_anchors: Tensor, num_contributing: Tensor) -> Tensor:
    """What the sums of the losses are divided by, at least 1."""
    counts = {"mean": num_anchors, "positive_mean": num_contributing}
    return counts.get(reduction, torch.ones_like(num_anchors)).clamp(min=1)


def gathered_sides(problem: Problem, membership: Membership, parts: Sequence[Any]) -> list[Tensor]:
    """Rows, their labels, columns and their labels of all ranks, this rank's own first."""
    assert problem.cols is not None
    assert problem.row_labels is not None and problem.col_labels is not None
    num_rows, num_cols = [part.num_rows for part in parts], [part.num_cols for part in parts]
    sent = [
        (problem.rows.detach(), num_rows),
        (problem.row_labels, num_rows),
        (problem.cols.detach(), num_cols),
        (problem.col_labels, num_cols),
    ]
    return [membership.own_first(of_ranks) for of_ranks in membership.gather(sent)]


def _against_all(problem: Problem, gathered: Sequence[Tensor]) -> list[Problem]:
    """The rank's rows against all columns, and its columns against all rows."""
    rows, row_labels, cols, col_labels = gathered
    one_way, other_way = problem.ways()
    return [
        dataclasses.replace(one_way, cols=cols, col_labels=col_labels),
        dataclasses.replace(other_way, cols=rows, col_labels=row_labels),
    ]
