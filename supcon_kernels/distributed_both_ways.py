"""The symmetric loss over the rows of every rank of a process group, and its gradient.

Each rank has its rows against all columns, and its columns against all rows. With everybody's
statistics each side's gradient is that of rows whose columns are anchors, too: one product, of
the own rows or columns with all of the other side, and nothing is sent in the backward.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from supcon_kernels import op
from supcon_kernels.problem import Problem, accumulation_dtype

if TYPE_CHECKING:
    from supcon_kernels.distributed import Membership

_ROWS, _COLS, _TEMPERATURE, _NUM_TENSORS = 0, 1, 5, 6


class BothWays(torch.autograd.Function):
    """The loss of all ranks' rows and columns, whose gradient is of this rank's, times the ranks.

    Its arguments are the operands of the rank's own problem, its membership, how many rows and how
    many columns every rank has, whether any rank wants a gradient, the backend and the reduction.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """The reduced loss, the same bits on every rank."""
        *operands, membership, lengths, is_needed, backend, reduction = arguments
        gathered = _gathered(Problem(*operands), membership, lengths)
        ways = _against_all(Problem(*operands), gathered)
        found = [op.forward(*way.operands(), "none", backend) for way in ways]
        sums = torch.cat([_sums(way, *of_way[::2]) for way, of_way in zip(ways, found)])
        parts = [(sums, [len(sums)] * membership.size)]
        for (_, _, stats, _), of_ranks in zip(found, lengths):
            parts.append((stats.T, of_ranks if is_needed else [0] * membership.size))
        sums_by_rank, *stats_by_side = membership.gather(parts)
        # In the order of the ranks, so that all have the same bits.
        totals, num_anchors, num_contributing = (
            functools.reduce(torch.add, sums_by_rank).view(2, 3).unbind(1)
        )
        counts = {"mean": num_anchors, "positive_mean": num_contributing}
        count = 2 * counts.get(reduction, torch.ones_like(totals)).clamp(min=1)

        all_stats = [membership.own_first(of_ranks).T.contiguous() for of_ranks in stats_by_side]
        of_ways = [x for _, _, stats, prepared in found for x in (stats, prepared)]
        saved = (count, *of_ways, *all_stats, *gathered)
        ctx.save_for_backward(*saved, *operands[:_NUM_TENSORS])
        ctx.options = operands[_NUM_TENSORS:]
        ctx.backend, ctx.num_ranks, ctx.num_arguments = backend, membership.size, len(arguments)
        mean: Tensor = (totals / count).sum().to(found[0][0].dtype)
        return mean

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the rank's rows and columns, and its part of the temperature's."""
        count, *saved = ctx.saved_tensors
        of_ways, all_stats, gathered = (saved[:2], saved[2:4]), saved[4:6], saved[6:10]
        inputs = saved[10:]
        weights = grad * (ctx.num_ranks / count).to(grad.dtype)
        result: list[Tensor | None] = [None] * ctx.num_arguments
        wants_temperature = ctx.needs_input_grad[_TEMPERATURE]
        ways = _against_all(Problem(*inputs, *ctx.options), gathered)
        grad_tau = grad.new_zeros(())
        for side, index in ((0, _ROWS), (1, _COLS)):
            way, (stats, prepared), of_others = ways[side], of_ways[side], all_stats[1 - side]
            wants = ctx.needs_input_grad[index]
            if not wants and not wants_temperature:
                continue
            own_weight = weights[side].expand(way.num_rows)
            other_weight = weights[1 - side].expand(way.num_cols)
            call = (own_weight, torch.ones_like(grad), stats, prepared, wants, False)
            options = (wants_temperature, *way.operands(), "none", ctx.backend)
            gradient, _, part = op.backward(*call, *options, other_weight, of_others)
            if wants:
                result[index] = gradient
            if wants_temperature:
                grad_tau = grad_tau + part
        if wants_temperature:
            result[_TEMPERATURE] = grad_tau.to(inputs[_TEMPERATURE])
        return tuple(result)


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


def _sums(way: Problem, loss: Tensor, stats: Tensor) -> Tensor:
    """(3,) of the rank's anchors: their losses, how many there are, and how many contribute."""
    of_anchors = (loss, ~way.row_ignored(), stats[1] != torch.inf)
    return torch.stack([x.sum(dtype=accumulation_dtype(loss)) for x in of_anchors])
