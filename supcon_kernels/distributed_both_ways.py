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
from supcon_kernels.backends.protocol import Anchors, Results, Wanted
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
        lengths = [[part.num_rows for part in parts], [part.num_cols for part in parts]]
        gathered = _gathered(problem, membership, lengths)
        ways = _against_all(problem, gathered)
        found = [op.results_of(way, backend, "none") for way in ways]
        sums = torch.cat([sums_of(way, of_way) for way, of_way in zip(ways, found)])
        sent = [(sums, [len(sums)] * membership.size)]
        is_needed = any(part.needs for part in parts)
        for of_way, of_ranks in zip(found, lengths):
            sent.append((of_way.stats.T, of_ranks if is_needed else [0] * membership.size))
        sums_by_rank, *stats_by_side = membership.gather(sent)
        # In the order of the ranks, so that all have the same bits.
        totals, *counts = functools.reduce(torch.add, sums_by_rank).view(2, 3).unbind(1)
        count = 2 * count_of(reduction, *counts)

        all_stats = [membership.own_first(of_ranks).T.contiguous() for of_ranks in stats_by_side]
        of_ways = [x for of_way in found for x in (of_way.stats, of_way.prepared)]
        saved = (count, *of_ways, *all_stats, *gathered)
        ctx.save_for_backward(*saved, *operands[:NUM_TENSORS])
        ctx.options = operands[NUM_TENSORS:]
        ctx.backend, ctx.num_ranks = backend, membership.size
        mean: Tensor = (totals / count).sum().to(found[0].loss.dtype)
        return mean

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the rank's rows and columns, and its part of the temperature's."""
        count, *saved = ctx.saved_tensors
        of_ways, all_stats, gathered = (saved[:2], saved[2:4]), saved[4:6], saved[6:10]
        inputs, one = saved[10:], torch.ones_like(grad)
        weights = grad * (ctx.num_ranks / count).to(grad.dtype)
        wanted, grad_tau = op.wanted_of(ctx), grad.new_zeros(())
        by_side: list[Tensor] = []
        for side, way in enumerate(_against_all(Problem(*inputs, *ctx.options), gathered)):
            needs = Wanted(rows=wanted[side], temperature=wanted.temperature)
            own_weight = weights[side].expand(way.num_rows)
            other_weight = weights[1 - side].expand(way.num_cols)
            anchors = Anchors(own_weight, one, *of_ways[side])
            others = Anchors(other_weight, one, all_stats[1 - side])
            if any(needs):
                grads = op.gradients_of(way, anchors, others, needs, ctx.backend)
                by_side.append(grads.rows)
                if wanted.temperature:
                    grad_tau = grad_tau + grads.temperature
            else:
                by_side.append(grad)
        return op.by_operand(ctx, (*by_side, grad_tau), inputs)


def sums_of(problem: Problem, found: Results) -> Tensor:
    """(3,) of the rank's anchors: their losses, how many there are, and how many contribute."""
    of_anchors = (found.loss, ~problem.row_ignored(), found.stats[1] != torch.inf)
    return torch.stack([x.sum(dtype=accumulation_dtype(found.loss)) for x in of_anchors])


def count_of(reduction: str, num_anchors: Tensor, num_contributing: Tensor) -> Tensor:
    """What the sums of the losses are divided by, at least 1."""
    counts = {"mean": num_anchors, "positive_mean": num_contributing}
    return counts.get(reduction, torch.ones_like(num_anchors)).clamp(min=1)


def _gathered(
    problem: Problem, membership: Membership, lengths: Sequence[list[int]]
) -> list[Tensor]:
    """Rows, their labels, columns and their labels of all ranks, this rank's own first."""
    assert problem.cols is not None
    assert problem.row_labels is not None and problem.col_labels is not None
    num_rows, num_cols = lengths
    parts = [
        (problem.rows.detach(), num_rows),
        (problem.row_labels, num_rows),
        (problem.cols.detach(), num_cols),
        (problem.col_labels, num_cols),
    ]
    return [membership.own_first(of_ranks) for of_ranks in membership.gather(parts)]


def _against_all(problem: Problem, gathered: Sequence[Tensor]) -> list[Problem]:
    """The rank's rows against all columns, and its columns against all rows."""
    rows, row_labels, cols, col_labels = gathered
    one_way, other_way = problem.ways()
    return [
        dataclasses.replace(one_way, cols=cols, col_labels=col_labels),
        dataclasses.replace(other_way, cols=rows, col_labels=row_labels),
    ]
