"""The loss over the rows of every rank as one operator, which ``torch.compile`` keeps whole.

How many rows the other ranks have is known only when the graph runs. So nothing whose size they
decide leaves the operator, and its backward gathers rows and statistics again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from supcon_kernels import distributed as one_way
from supcon_kernels import distributed_both_ways as both_ways
from supcon_kernels import op
from supcon_kernels.backends import FUSED
from supcon_kernels.backends.protocol import Anchors, Wanted
from supcon_kernels.distributed import Gathered
from supcon_kernels.distributed_both_ways import Ranks
from supcon_kernels.problem import (
    NUM_FIELDS,
    NUM_TENSORS,
    SCHEMA,
    Problem,
    accumulation_dtype,
)
from supcon_kernels.ranks import Membership, Part, agree, text_and_sizes, text_of
from supcon_kernels.validation import Call

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_OPTIONS = (
    "str backend, str reduction, str group, str text, bool first_views, bool unlabelled, "
    "bool wants_rows, bool wants_cols, SymInt[] sizes, float? base_temperature"
)
forward = op.define(
    f"loss_of_ranks({SCHEMA}, {_OPTIONS}) "
    "-> (Tensor loss, Tensor count, Tensor stats, Tensor parts)"
)
backward = op.define(
    "gradients_of_ranks(Tensor grad_loss, Tensor count, Tensor stats, Tensor parts, bool needs_rows, "
    f"bool needs_cols, bool needs_temperature, {SCHEMA}, {_OPTIONS}) "
    "-> (Tensor rows, Tensor cols, Tensor temperature)"
)


class _Options(NamedTuple):
    """What the operator is told beside the problem.

    Attributes:
        backend, reduction: as in ``supcon_loss``.
        group: the name of the process group.
        text: what must agree between ranks, except for sizes and numbers.
        first_views: whether the anchors are the first of the contrasts.
        unlabelled: whether every rank has numbered its samples for itself.
        wants_rows, wants_cols: as in ``Part``.
        sizes: those in the text.
        base_temperature: as in ``supcon_loss``.
    """

    backend: str
    reduction: str
    group: str
    text: str
    first_views: bool
    unlabelled: bool
    wants_rows: bool
    wants_cols: bool
    sizes: Sequence[int]
    base_temperature: float | None


def traced_loss(
    build: Callable[[], tuple[Problem, str]], call: Call, group: ProcessGroup
) -> tuple[Problem, Tensor]:
    """As ``distributed.loss_of_all``, in a trace.

    What is wrong in a trace is raised by the rank alone: the others wait until the group's timeout.
    """
    problem, backend = build()
    problem = problem.by_rows()
    one_way.check(problem, backend, call.reduction)
    fields = dict(zip(Call._fields, call))  # torch 2.5 does not trace _asdict
    for number in ("temperature", "base_temperature", "ignore_index"):
        del fields[number]  # it may be known by name alone
    alike = {**fields, "backend": backend, "requires_grad": _wants_gradient(problem)}
    text, sizes = text_and_sizes(alike)
    part = one_way.part_of(problem)
    options = _Options(
        backend,
        call.reduction,
        group.group_name,
        text,
        call.contrast_features is None,
        call.labels is None,
        bool(part.wants_rows),
        bool(part.wants_cols),
        sizes,
        call.base_temperature,
    )
    return problem, forward(*problem.operands(), *options)[0]


def _wants_gradient(problem: Problem) -> bool:
    leaves = (problem.rows, problem.cols, problem.temperature_tensor)
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)


def _parsed(operands: Sequence[Any]) -> tuple[Problem, _Options, Membership]:
    problem, options = Problem(*operands[:NUM_FIELDS]), _Options(*operands[NUM_FIELDS:])
    return problem, options, Membership.of(_group_of(options), problem.rows)


def _group_of(options: _Options) -> ProcessGroup:
    from torch.distributed.distributed_c10d import _resolve_process_group  # not in every build

    return _resolve_process_group(options.group)  # type: ignore[arg-type]


def _gathered(
    problem: Problem, options: _Options, ranks: Ranks
) -> tuple[Problem, Gathered | Problem]:
    """The rank's problem, its samples numbered; and what the ranks send each other, or what comes of
    it where they exchange sums.
    """
    membership, parts = ranks.membership, ranks.parts
    if options.unlabelled:
        first = sum(of_rank.num_cols for of_rank in parts[: membership.rank])
        problem = one_way.renumbered(problem, first)
    if problem.symmetric:
        return problem, both_ways.against_all(problem, ranks)
    return problem, Gathered.of(problem, options.first_views, membership, parts)


def _forward(*operands: Any) -> tuple[Tensor, ...]:
    """The loss, what its sums were divided by, the rank's statistics and every rank's ``Part``."""
    problem, options, membership = _parsed(operands)
    failure = None
    try:
        membership.check_device(problem.rows)
    except ValueError as error:
        failure = error
    needs = int(options.wants_rows), int(options.wants_cols)
    part = Part(problem.num_rows, problem.num_cols, *needs)
    tau = problem.temperature_tensor
    given = {
        "temperature": problem.temperature if tau is None else tau,
        "base_temperature": options.base_temperature,
        "ignore_index": problem.ignore_index,
    }
    text = options.text.format(*options.sizes) + "\n" + text_of(given)
    numbers = agree(membership, text, failure, part)
    # The backward gathers the statistics.
    ranks = Ranks(
        membership, [Part(*of_rank)._replace(wants_rows=0, wants_cols=0) for of_rank in numbers]
    )
    problem, gathered = _gathered(problem, options, ranks)
    how = (options.backend, options.reduction)
    if isinstance(gathered, Gathered):
        loss, (count, stats, *_) = one_way.loss_and_saved(problem, gathered, membership, *how)
    else:
        loss, (count, stats, own_stats, *_) = both_ways.loss_and_saved(
            problem, gathered, ranks, *how
        )
        stats = torch.cat([stats, own_stats], dim=1)
    return loss, count, stats, torch.tensor(numbers)


def _backward(
    grad_loss: Tensor,
    count: Tensor,
    stats: Tensor,
    numbers: Tensor,
    needs_rows: bool,
    needs_cols: bool,
    needs_temperature: bool,
    *operands: Any,
) -> tuple[Tensor, ...]:
    problem, options, membership = _parsed(operands)
    ranks = Ranks(membership, [Part(*of_rank) for of_rank in numbers.tolist()])
    problem, gathered = _gathered(problem, options, ranks)
    weight, count = grad_loss * membership.size, count.to(grad_loss.dtype)
    wanted = Wanted(needs_rows, needs_cols, needs_temperature, unrounded=True)
    if isinstance(gathered, Gathered):
        (by_rank,) = membership.gather([(stats.T, gathered.num_rows)])
        saved = (stats, membership.without_own(by_rank).T.contiguous(), None)
        tensors = gathered.tensors()
        of_sum = weight / count
        grads = one_way.gradients(problem, tensors, of_sum, saved, wanted, options.backend)
    else:
        of_rows, own_stats = stats.split((problem.num_rows, problem.num_cols), dim=1)
        (by_rank,) = membership.gather([(own_stats.T, ranks.num_cols)])
        stats = torch.cat([of_rows, torch.cat(by_rank).T], dim=1)
        anchors = Anchors(weight, count, stats)
        own_cols = problem.cols
        assert own_cols is not None
        grads = both_ways.gradients(own_cols, gathered, anchors, wanted, ranks, options.backend)
    inputs = (problem.rows, problem.cols, grads.temperature)
    return tuple(
        grad.to(x) if want else problem.rows.new_empty(0)
        for grad, x, want in zip(grads, inputs, wanted)
    )


def _forward_fake(*operands: Any) -> tuple[Tensor, ...]:
    problem, options = Problem(*operands[:NUM_FIELDS]), _Options(*operands[NUM_FIELDS:])
    stats, _ = FUSED[options.backend].saved(problem)
    if problem.symmetric:
        stats = stats.new_empty(stats.shape[0], problem.num_rows + problem.num_cols)
    size = _group_of(options).size()
    return (
        stats.new_empty((), dtype=problem.dtype),
        stats.new_empty((2,) if problem.symmetric else (), dtype=accumulation_dtype(stats)),
        stats,
        torch.empty(size, len(Part._fields), dtype=torch.int64, device="cpu"),
    )


def _backward_fake(grad_loss: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    wanted, (rows, cols) = operands[3:6], operands[6:8]
    return (
        rows.new_empty(rows.shape if wanted[0] else (0,)),
        rows.new_empty(cols.shape if wanted[1] else (0,)),
        grad_loss.new_empty(()) if wanted[2] else rows.new_empty(0),
    )


class _OfRanks(torch.autograd.Function):
    """``forward``, whose gradient is ``backward``."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            loss, *saved = forward(*operands)
        ctx.mark_non_differentiable(*saved)
        ctx.save_for_backward(*saved, *operands[:NUM_TENSORS])
        ctx.options = operands[NUM_TENSORS:]
        return loss, *saved

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved, inputs = ctx.saved_tensors[:-NUM_TENSORS], ctx.saved_tensors[-NUM_TENSORS:]
        grads = backward(grad_loss, *saved, *op.needs_of(ctx), *inputs, *ctx.options)
        return op.by_operand(ctx, grads, inputs)


op.register(forward, _forward, _forward_fake, _OfRanks)
op.register(backward, _backward, _backward_fake, None)
