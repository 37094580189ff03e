"""The loss over the rows of every rank of a process group, and its gradient.

The forward gathers the rows and, after each rank has computed the losses of its own anchors, three
numbers of each anchor. With those every rank makes the whole gradient of its own rows, so that the
backward sends nothing. docs/scaling.md counts the bytes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from supcon_kernels import op
from supcon_kernels.backends.protocol import Anchors, Gradients, Wanted
from supcon_kernels.distributed_both_ways import BothWays, Ranks, count_of, sums_of
from supcon_kernels.problem import NUM_TENSORS, Problem
from supcon_kernels.ranks import Membership, Part, agree, text_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from supcon_kernels.validation import Call


@_disable_dynamo
def loss_of_all(
    build: Callable[[], tuple[Problem, str]], call: Call, group: ProcessGroup
) -> tuple[Problem, Tensor]:
    """The rank's own problem, and the reduced loss of the rows of all ranks, the same bits on each.

    Args:
        build: validates the rank's arguments, makes its problem and chooses its backend.
        call: the arguments, whose kinds and values must agree between ranks.
        group: every rank of it makes this call.

    Raises:
        ValueError: on every rank, where an argument disagrees or was refused on one of them.
        TypeError: ``group`` is no process group.
    """
    membership = Membership.of(group, call.features)
    problem, backend, text, failure, part = None, "", "", None, Part()
    try:
        problem, backend = build()
        problem = problem.by_rows()
        check(problem, backend, call.reduction)
        membership.check_device(problem.rows)
        text = text_of({**call._asdict(), "backend": backend})
        part = part_of(problem)
    except Exception as error:  # whatever it is, the other ranks must hear of it
        failure = error
    parts = [Part(*numbers) for numbers in agree(membership, text, failure, part)]
    assert problem is not None

    if call.labels is None:  # every rank has numbered its samples for itself
        first = sum(of_rank.num_cols for of_rank in parts[: membership.rank])
        problem = renumbered(problem, first)
    if problem.symmetric:
        ranks = Ranks(membership, parts)
        ranks.check()
        loss: Tensor = BothWays.apply(*problem.operands(), ranks, backend, call.reduction)
        return problem, loss
    gathered = Gathered.of(problem, call.contrast_features is None, membership, parts)
    options = (gathered, membership, backend, call.reduction)
    return problem, _Differentiable.apply(*problem.operands(), *options)


def part_of(problem: Problem) -> Part:
    """This rank's part in the call."""
    tau, cols = problem.temperature_tensor, _contrasts(problem)[0]
    wants = torch.is_grad_enabled()
    of_rows = problem.rows.requires_grad or (tau is not None and tau.requires_grad)
    needs = int(wants and of_rows), int(wants and cols.requires_grad)
    return Part(problem.num_rows, problem.num_cols, *needs)


def check(problem: Problem, backend: str, reduction: str) -> None:
    """What a call of one process may be and one of a group may not."""
    if reduction == "none":
        raise ValueError(
            "reduction must be 'mean', 'positive_mean' or 'sum' with group, got 'none'"
        )
    if problem.weights is not None:
        raise ValueError(
            "mask must be None with group, got one: it says nothing of other ranks' rows"
        )
    if backend == "reference":
        raise ValueError(
            "backend must be None, 'native', 'triton' or 'tiled' with group, got 'reference', "
            "which is the loss of one process, and the only one for torch.func"
        )


def renumbered(problem: Problem, first: int) -> Problem:
    """The problem with its samples numbered from ``first`` on."""
    assert problem.row_labels is not None
    of_cols = problem.col_labels
    return dataclasses.replace(
        problem,
        row_labels=problem.row_labels + first,
        col_labels=None if of_cols is None else of_cols + first,
    )


def _contrasts(problem: Problem) -> tuple[Tensor, Tensor]:
    """The columns and their labels, which may be the rows'."""
    cols = problem.rows if problem.cols is None else problem.cols
    labels = problem.row_labels if problem.cols is None else problem.col_labels
    assert labels is not None
    return cols, labels


@dataclasses.dataclass(frozen=True)
class Gathered:
    """What the ranks have sent each other: this rank's own first, then the others' in their order.

    Attributes:
        cols: (M, D) contrasts of all ranks.
        col_labels: (M,) or (M, C).
        other_rows: (N - n, D) anchors of the others, and
        other_row_labels: (N - n,) or (N - n, C); may be missing where no gradient needs them.
        num_rows: how many anchors each rank has, this one too; 0 where no gradient needs them.
    """

    cols: Tensor
    col_labels: Tensor
    other_rows: Tensor
    other_row_labels: Tensor
    num_rows: list[int]

    @staticmethod
    def of(
        problem: Problem, first_views: bool, membership: Membership, parts: Sequence[Part]
    ) -> Gathered:
        """Gathers the contrasts; with them the anchors, if needed and not among the contrasts.

        Args:
            problem: this rank's own.
            first_views: whether the anchors are the first of the contrasts.
            membership, parts: of all ranks.
        """
        assert problem.row_labels is not None
        needed = any(part.wants_cols for part in parts)
        num_rows = [part.num_rows if needed else 0 for part in parts]
        num_cols = [part.num_cols for part in parts]
        sent = [(x.detach(), num_cols) for x in _contrasts(problem)]
        own = [problem.rows.detach(), problem.row_labels]
        if needed and not (problem.square or first_views):
            sent += [(x, num_rows) for x in own]
        of_cols, of_col_labels, *of_rows = membership.gather(sent)
        cols, col_labels = [membership.own_first(xs) for xs in (of_cols, of_col_labels)]
        if problem.square:
            rows = [x[problem.num_cols :] for x in (cols, col_labels)]
        else:
            if first_views:
                of_rows = [[x[:n] for x, n in zip(xs, num_rows)] for xs in (of_cols, of_col_labels)]
            rows = [membership.without_own(xs) for xs in of_rows] or [x[:0] for x in own]
        return Gathered(cols, col_labels, rows[0], rows[1], num_rows)

    def tensors(self) -> tuple[Tensor, ...]:
        """The fields that are tensors, in order."""
        return self.cols, self.col_labels, self.other_rows, self.other_row_labels


def loss_and_saved(
    problem: Problem, gathered: Gathered, membership: Membership, backend: str, reduction: str
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss of all ranks' anchors, and for ``gradients`` the count that its sum was divided by, the
    statistics of this rank's anchors and of the others, and what is prepared.
    """
    whole = problem
    if membership.size > 1:  # its own anchors are the first of all contrasts, as of its own
        whole = dataclasses.replace(problem, cols=gathered.cols, col_labels=gathered.col_labels)
    found = op.results_of(whole, backend, "none")
    sent = [
        (sums := sums_of(problem, found.loss, found.stats), [len(sums)] * membership.size),
        (found.stats.T, gathered.num_rows),
    ]
    sums_by_rank, stats_by_rank = membership.gather(sent)
    # In the order of the ranks, so that all have the same bits.
    total, *counts = functools.reduce(torch.add, sums_by_rank)
    count = count_of(reduction, *counts)
    other_stats = membership.without_own(stats_by_rank).T.contiguous()
    mean: Tensor = (total / count).to(found.loss.dtype)
    return mean, (count, found.stats, other_stats, found.prepared)


def gradients(
    problem: Problem,
    gathered: Sequence[Tensor],
    weight: Tensor,
    saved: Sequence[Any],
    wanted: Wanted,
    backend: str,
) -> Gradients:
    """Gradients of this rank's rows, columns and temperature.

    Args:
        problem: this rank's own.
        gathered: the tensors of ``Gathered``.
        weight: gradient of the sum of all losses.
        saved: what ``loss_and_saved`` saved, without the count.
        wanted: which gradients, unrounded.
        backend: made the statistics.
    """
    stats, other_stats, prepared = saved
    # The weight is of the sum of all losses, of which no count is taken any more.
    anchors = Anchors(weight, torch.ones_like(weight), stats, prepared)
    others = anchors._replace(stats=other_stats, prepared=None)
    # The CPU kernel makes use of the symmetry of a rank's own pairs.
    of_backend = _gradients if backend == "native" else _gradients_at_once
    return of_backend(problem, gathered, anchors, others, wanted, backend)


class _Differentiable(torch.autograd.Function):
    """The loss of all ranks' anchors, whose gradient is of this rank's rows, times the ranks."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *operands, gathered, membership, backend, reduction = arguments
        problem = Problem(*operands)
        loss, saved = loss_and_saved(problem, gathered, membership, backend, reduction)
        ctx.save_for_backward(*saved, *gathered.tensors(), *operands[:NUM_TENSORS])
        ctx.options = operands[NUM_TENSORS:]
        ctx.backend, ctx.num_ranks = backend, membership.size
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        count, *saved = ctx.saved_tensors
        saved, gathered, inputs = saved[:3], saved[3:-NUM_TENSORS], saved[-NUM_TENSORS:]
        weight = grad * (ctx.num_ranks / count).to(grad.dtype)
        problem = Problem(*inputs, *ctx.options)
        wanted = Wanted(*op.needs_of(ctx))._replace(unrounded=True)
        grads = gradients(problem, gathered, weight, saved, wanted, ctx.backend)
        return op.by_operand(ctx, grads, inputs)


def _gradients(
    problem: Problem,
    gathered: Sequence[Tensor],
    anchors: Anchors,
    others: Anchors,
    wanted: Wanted,
    backend: str,
) -> Gradients:
    """Gradients of this rank's rows (n, D) and cols (m, D), of its own and of all others' losses.

    A pair with an anchor or a contrast of this rank is one of its own anchors and contrasts, of its
    anchors and the others' contrasts, or of the others' anchors and its contrasts. An anchor meets
    itself among the first alone. Where anchors are contrasts, the others are computed together,
    and each rank has half of what they give to the temperature.

    Args:
        problem: this rank's own.
        gathered: the tensors of ``Gathered``.
        anchors: this rank's.
        others: those of the other ranks; none where no rank wants its contrasts' gradient.
        wanted: which gradients.
        backend: made the statistics.
    """
    cols, labels = _contrasts(problem)
    *of_cols, other_rows, other_row_labels = gathered
    other_cols, other_col_labels = [x[problem.num_cols :] for x in of_cols]
    anchors, has_others = anchors._replace(prepared=None), others.stats.shape[1] > 0

    of_block = functools.partial(op.gradients_of, backend=backend)
    grad_rows, grad_cols, grad_tau = of_block(problem, anchors, None, wanted)
    if len(other_cols) and (wanted.rows or wanted.temperature):
        against_others = dataclasses.replace(
            problem, cols=other_cols, col_labels=other_col_labels, self_offset=None
        )
        col_anchors = others if problem.square and has_others else None
        more = of_block(against_others, anchors, col_anchors, wanted._replace(cols=False))
        grad_rows, grad_tau = grad_rows + more.rows, grad_tau + more.temperature
    if has_others and wanted.cols:
        of_others = dataclasses.replace(
            problem,
            rows=other_rows,
            row_labels=other_row_labels,
            cols=cols,
            col_labels=labels,
            self_offset=None,
        )
        only_cols = Wanted(cols=True, unrounded=True)
        grad_cols = grad_cols + of_block(of_others, others, None, only_cols).cols
    return Gradients(grad_rows, grad_cols, grad_tau)


def _gradients_at_once(
    problem: Problem,
    gathered: Sequence[Tensor],
    anchors: Anchors,
    others: Anchors,
    wanted: Wanted,
    backend: str,
) -> Gradients:
    """As ``_gradients``, by a backend that takes all contrasts at once, as the forward prepared them.

    The gradient of contrasts that are no anchors needs the anchors of all ranks: these, and the
    rank's own contrasts, are prepared for it.
    """
    cols, labels, other_rows, other_row_labels = gathered
    num_others = others.stats.shape[1]
    stats = torch.cat([anchors.stats, others.stats], dim=1)
    whole, col_anchors = problem, None
    if len(cols) > problem.num_cols:
        whole = dataclasses.replace(problem, cols=cols, col_labels=labels)
        if problem.square and stats.shape[1] == len(cols):
            col_anchors = anchors._replace(stats=stats, prepared=None)
    is_alone = whole is problem and num_others == 0
    now = wanted._replace(cols=wanted.cols and is_alone)
    own = anchors._replace(stats=stats[:, : problem.num_rows])
    grad_rows, grad_cols, grad_tau = op.gradients_of(whole, own, col_anchors, now, backend)
    if wanted.cols and not is_alone:
        assert problem.cols is not None and problem.row_labels is not None
        assert problem.col_labels is not None
        # The others' anchors first, the rank's own contrasts among its anchors first: so no other
        # anchor is in the place of one that is itself a contrast.
        offset = problem.self_offset or 0
        against = dataclasses.replace(
            problem,
            rows=torch.cat([other_rows, problem.rows]),
            row_labels=torch.cat([other_row_labels, problem.row_labels]),
            cols=problem.cols.roll(-offset, 0),
            col_labels=problem.col_labels.roll(-offset, 0),
            self_offset=None if problem.self_offset is None else -num_others,
        )
        every = anchors._replace(stats=stats.roll(num_others, 1), prepared=None)
        only_cols = Wanted(cols=True, unrounded=True)
        of_cols = op.gradients_of(against, every, None, only_cols, backend).cols
        grad_cols = of_cols.roll(offset, 0)
    return Gradients(grad_rows, grad_cols, grad_tau)
