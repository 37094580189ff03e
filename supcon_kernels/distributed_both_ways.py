"""The symmetric loss over the rows of every rank of a process group, and its gradient.

A rank contrasts its rows with all columns, so that it knows of each column the sums over these rows.
The ranks exchange them, and each adds up those of its own columns. With everybody's statistics the
same pairs then give the whole gradient of the rows, and a part of each column's, which are exchanged
and added up, too. Where each positive stands against all negatives alone, other ranks' too, these are
exchanged first.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from supcon_kernels import op, partial_sums
from supcon_kernels.backends import FUSED
from supcon_kernels.backends.protocol import Anchors, Gradients, Wanted
from supcon_kernels.problem import NUM_TENSORS, Problem, accumulation_dtype
from supcon_kernels.ranks import Membership, Part


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Who takes part in a call, and how.

    Attributes:
        membership: this process in the group.
        parts: every rank's part.
    """

    membership: Membership
    parts: Sequence[Part]

    @property
    def num_cols(self) -> list[int]:
        """How many columns each rank has."""
        return [part.num_cols for part in self.parts]

    @property
    def want_gradients(self) -> bool:
        """Whether any rank wants one, which needs the statistics of all columns."""
        return any(part.wants_rows or part.wants_cols for part in self.parts)

    @property
    def want_cols(self) -> bool:
        """Whether any rank wants that of its columns, of which all ranks have parts."""
        return any(part.wants_cols for part in self.parts)

    def check(self) -> None:
        """All ranks call ``backward``, if they send each other parts."""
        if self.want_cols and not all(part.wants_rows or part.wants_cols for part in self.parts):
            raise ValueError(
                "contrast_features must require grad on no rank of group with symmetric=True, "
                "or something must on every rank, since their gradient is made by all of them"
            )

    def merged(self, problem: Problem, sums: Tensor) -> Tensor:
        """The sums of this rank's columns over all ranks' rows, given those of all over this rank's."""
        return partial_sums.merged(problem, [part.T for part in self.of_own_cols(sums.T)])

    def of_own_cols(self, of_cols: Tensor) -> list[Tensor]:
        """What every rank has of this rank's columns, given what this rank has of all (M, …)."""
        return self.membership.exchange(of_cols, self.num_cols)


class BothWays(torch.autograd.Function):
    """The loss of all ranks' rows and columns, whose gradient is of this rank's, times the ranks.

    Its arguments are the operands of the rank's own problem, the ranks, the backend and the reduction.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """The reduced loss, the same bits on every rank."""
        *operands, ranks, backend, reduction = arguments
        problem = Problem(*operands)
        block = against_all(problem, ranks)
        loss, (count, stats, _, of_cols, prepared) = loss_and_saved(
            problem, block, ranks, backend, reduction
        )
        stats = torch.cat((stats, of_cols), dim=1)
        assert block.cols is not None
        ctx.save_for_backward(
            count, stats, prepared, block.cols, block.col_labels, *operands[:NUM_TENSORS]
        )
        ctx.options = operands[NUM_TENSORS:]
        ctx.ranks, ctx.backend = ranks, backend
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the rank's rows and columns, and its part of the temperature's."""
        count, stats, prepared, cols, col_labels, *inputs = ctx.saved_tensors
        block = Problem(*inputs, *ctx.options)
        block = dataclasses.replace(block, cols=cols, col_labels=col_labels)
        weight = grad * ctx.ranks.membership.size
        anchors = Anchors(weight, count.to(grad.dtype), stats, prepared)
        wanted = Wanted(*op.needs_of(ctx))
        grads = gradients(inputs[1], block, anchors, wanted, ctx.ranks, ctx.backend)
        return op.by_operand(ctx, grads, inputs)


def against_all(problem: Problem, ranks: Ranks) -> Problem:
    """The rank's rows against the columns of all ranks, in the order of the ranks."""
    assert problem.cols is not None and problem.col_labels is not None
    sent = [(x, ranks.num_cols) for x in (problem.cols.detach(), problem.col_labels)]
    cols, labels = map(torch.cat, ranks.membership.gather(sent))
    return dataclasses.replace(problem, cols=cols, col_labels=labels)


def loss_and_saved(
    problem: Problem, block: Problem, ranks: Ranks, backend: str, reduction: str
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The reduced loss, and what a gradient needs.

    That is: counts (2,), which the sums of both directions were divided by; the statistics of this
    rank's rows, of its columns, and of all columns, if any rank wants a gradient; what is prepared.
    """
    negatives = of_all_negatives(block, ranks, backend)
    of_rows, sums = FUSED[backend].forward_of_some(block, negatives)
    one_way, other_way = problem.ways()
    own_sums = ranks.merged(other_way, sums)
    col_losses = partial_sums.losses(other_way, own_sums)
    own_stats = FUSED[backend].statistics_of(other_way, own_sums)
    found = (one_way, of_rows.loss, of_rows.stats), (other_way, col_losses, own_stats)
    own = torch.stack([sums_of(*of_way) for of_way in found])
    lengths = ranks.num_cols if ranks.want_gradients else [0] * ranks.membership.size
    sent = [(own, [len(own)] * ranks.membership.size), (own_stats.T, lengths)]
    by_rank, stats_by_rank = ranks.membership.gather(sent)
    # In the order of the ranks, so that all have the same bits.
    totals, *counts = functools.reduce(torch.add, by_rank).unbind(1)
    count = 2 * count_of(reduction, *counts)
    loss: Tensor = (totals / count).sum().to(of_rows.loss.dtype)
    of_cols = torch.cat(stats_by_rank).T
    return loss, (count, of_rows.stats, own_stats, of_cols, of_rows.prepared)


def of_all_negatives(block: Problem, ranks: Ranks, backend: str) -> Tensor | None:
    """The log-sum-exp of every column over its negatives among the rows of all ranks, if it is needed."""
    if block.denominator != "one_positive":
        return None
    block = dataclasses.replace(block, summation="out", denominator="only_negatives")
    _, sums = FUSED[backend].forward_of_some(block)
    (own,) = ranks.merged(block, sums[:1])
    (by_rank,) = ranks.membership.gather([(own, ranks.num_cols)])
    return torch.cat(by_rank)


def gradients(
    own_cols: Tensor,
    block: Problem,
    anchors: Anchors,
    wanted: Wanted,
    ranks: Ranks,
    backend: str,
) -> Gradients:
    """Gradients of this rank's rows, columns and temperature.

    Args:
        own_cols: this rank's columns.
        block: as ``against_all`` has it.
        anchors: the rows and, behind them, all columns.
        wanted: which gradients of this rank's; any rank may want that of its columns.
        ranks: who has parts of these.
        backend: made the statistics.
    """
    wanted = wanted._replace(cols=ranks.want_cols, unrounded=True)
    rows, cols, temperature = op.gradients_of(block, anchors, None, wanted, backend)
    if ranks.want_cols:
        cols = _AddedUp.apply(cols, own_cols, ranks)
    return Gradients(rows, cols, temperature)


class _AddedUp(torch.autograd.Function):
    """The gradient of this rank's columns, of which all ranks have parts; its own gradient is refused."""

    @staticmethod
    def forward(ctx: Any, of_cols: Tensor, own_cols: Tensor, ranks: Ranks) -> Tensor:
        return functools.reduce(torch.add, ranks.of_own_cols(of_cols))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        op.refuse_second_derivative()


def sums_of(problem: Problem, losses: Tensor, stats: Tensor) -> Tensor:
    """(3,) of the rank's anchors: their losses, how many there are, and how many contribute."""
    of_anchors = (losses, ~problem.row_ignored(), stats[1] != torch.inf)
    return torch.stack([x.sum(dtype=accumulation_dtype(losses)) for x in of_anchors])


def count_of(reduction: str, num_anchors: Tensor, num_contributing: Tensor) -> Tensor:
    """What the sums of the losses are divided by, at least 1."""
    counts = {"mean": num_anchors, "positive_mean": num_contributing}
    return counts.get(reduction, torch.ones_like(num_anchors)).clamp(min=1)
