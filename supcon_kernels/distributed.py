"""The loss over the rows of every rank of a process group: what ranks tell each other, and its gradient.

The forward gathers the rows and, after each rank has computed the losses of its own anchors, three
numbers of each anchor. With those every rank makes the whole gradient of its own rows, so that the
backward sends nothing. docs/scaling.md counts the bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo

from supcon_kernels import op
from supcon_kernels.distributed_both_ways import BothWays
from supcon_kernels.problem import Problem, accumulation_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# The first collective of every call: whether the rank failed, what must agree, and its sizes.
_FAILED, _DIGEST, _LENGTH, _NUM_ROWS, _NUM_COLS, _NEEDS = range(6)
# The name that torch has given it, and the one of versions before.
_all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
_ALIGNMENT = 8  # bytes: of the widest elements that are sent
_ROWS, _COLS, _TEMPERATURE, _NUM_TENSORS = 0, 1, 5, 6


def resolved(group: ProcessGroup | str | None) -> ProcessGroup | None:
    """The process group that an argument ``group`` means now; None: this process alone.

    Raises:
        ValueError: a string that is neither "world" nor "local".
    """
    if not isinstance(group, str):
        return group
    if group not in ("world", "local"):
        raise ValueError(
            f"group must be a torch.distributed.ProcessGroup, 'world', 'local' or None, got {group!r}"
        )
    is_alone = group == "local" or not (dist.is_available() and dist.is_initialized())
    return None if is_alone else dist.group.WORLD


def warn_if_local() -> None:
    """Say once, on rank 0, that a loss without a group leaves out the other ranks' rows."""
    if torch.compiler.is_compiling() or not (dist.is_available() and dist.is_initialized()):
        return
    if dist.get_world_size() > 1 and dist.get_rank() == 0:
        _warn_of_local_rows()


@functools.cache
def _warn_of_local_rows() -> None:
    warnings.warn(
        f"supcon_loss contrasts each of the {dist.get_world_size()} ranks with its own rows only: "
        "pass group='world' to contrast with the rows of all ranks, or group='local' if this is meant",
        stacklevel=4,
    )


@_disable_dynamo
def loss_of_all(
    build: Callable[[], tuple[Problem, str]], call: Mapping[str, Any], group: ProcessGroup
) -> tuple[Problem, Tensor]:
    """The rank's own problem, and the reduced loss of the rows of all ranks, the same bits on each.

    Args:
        build: validates the rank's arguments, makes its problem and chooses its backend.
        call: the arguments of ``supcon_loss``, whose kinds and values must agree between ranks.
        group: every rank of it makes this call.

    Raises:
        ValueError: on every rank, where an argument disagrees or was refused on one of them.
        TypeError: ``group`` is no process group.
    """
    membership = Membership.of(group, call["features"])
    problem, backend, text, failure = None, "", "", None
    numbers = [0, 0, 0]
    try:
        problem, backend = build()
        problem = problem.by_rows()
        _check(problem, backend, call["reduction"], membership)
        text = _text({**call, "backend": backend})
        needs = torch.is_grad_enabled() and _needs_statistics(problem)
        numbers = [problem.rows.shape[0], problem.num_cols, int(needs)]
    except Exception as error:  # whatever it is, the other ranks must hear of it
        failure = error
    records = _agree(membership, text, failure, numbers)
    assert problem is not None

    if call["labels"] is None:  # every rank has numbered its samples for itself
        first = sum(record[_NUM_COLS] for record in records[: membership.rank])
        problem = _renumbered(problem, first)
    options = (backend, call["reduction"])
    if problem.symmetric:
        lengths = [[record[side] for record in records] for side in (_NUM_ROWS, _NUM_COLS)]
        needed = any(record[_NEEDS] for record in records)
        operands = (*problem.operands(), membership, lengths, needed)
        both: Tensor = BothWays.apply(*operands, *options)
        return problem, both
    first_views = call["contrast_features"] is None
    gathered = _Gathered.of(problem, first_views, membership, records)
    loss: Tensor = _Differentiable.apply(*problem.operands(), gathered, membership, *options)
    return problem, loss


@_disable_dynamo
def rows_of_all(
    build: Callable[[], tuple[Tensor, Tensor]],
    queue: Tensor,
    group: ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """The features (N, D) and labels (N,) of all ranks, in the order of the ranks.

    Args:
        build: validates the rank's arguments and gives its features (n, D) and labels (n,).
        queue: (size, D) where they go, alike on all ranks.
        group: every rank of it makes this call.

    Raises:
        ValueError: on every rank, where an argument disagrees or was refused on one of them.
        TypeError: ``group`` is no process group.
    """
    membership = Membership.of(group, queue)
    rows, text, failure = None, "", None
    try:
        rows = build()
        membership.check_device(rows[0])
        text = _text({**dict(zip(("features", "labels"), rows)), "size": len(queue)})
    except Exception as error:  # whatever it is, the other ranks must hear of it
        failure = error
    records = _agree(membership, text, failure, [len(rows[0]) if rows else 0, 0, 0])
    assert rows is not None
    lengths = [record[_NUM_ROWS] for record in records]
    features, labels = membership.gather([(x.detach(), lengths) for x in rows])
    return torch.cat(features), torch.cat(labels)


# --- what ranks tell each other


@dataclasses.dataclass(frozen=True)
class Membership:
    """This process in a group."""

    group: ProcessGroup
    rank: int
    size: int
    devices: list[str]  # types of devices whose tensors the group takes
    device: torch.device  # where small tensors are sent from: the same type on every rank

    @staticmethod
    def of(group: Any, features: Any) -> Membership:
        """This process in ``group``, which sends from the device of ``features`` where it can."""
        if not dist.is_available():
            raise ValueError("group must be None where torch.distributed is not available")
        if isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group must contain this process, got one that it is no member of")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "group must be a torch.distributed.ProcessGroup, 'world', 'local' or None, "
                f"got {type(group).__name__}"
            )
        if not dist.is_initialized():
            raise ValueError("group must be initialised, got one that was destroyed")
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError("group must contain this process, got one that it is no member of")
        config = dist.get_backend_config(group).split(",")
        devices = [pair.partition(":")[0] for pair in config]
        kind = "cpu" if "cpu" in devices else devices[0]
        found = features.device if isinstance(features, Tensor) else torch.device(kind)
        device = found if found.type == kind else torch.device(kind)
        return Membership(group, rank, dist.get_world_size(group), devices, device)

    def check_device(self, features: Tensor) -> None:
        """The group takes tensors of the features' device."""
        if features.device.type not in self.devices:
            raise ValueError(
                f"group must take tensors on the device of features ({features.device}), "
                f"got one for {' and '.join(self.devices)}"
            )

    def own_first(self, by_rank: list[Tensor]) -> Tensor:
        """What this rank sent, then what the others sent in their order."""
        return torch.cat([by_rank[self.rank], *by_rank[: self.rank], *by_rank[self.rank + 1 :]])

    def without_own(self, by_rank: list[Tensor]) -> Tensor:
        """What the other ranks sent, in their order."""
        return torch.cat([x[:0] if rank == self.rank else x for rank, x in enumerate(by_rank)])

    def gather(self, parts: Sequence[tuple[Tensor, list[int]]]) -> list[list[Tensor]]:
        """Each tensor from every rank, by tensor and by rank, in one collective.

        Args:
            parts: tensors, each with how many of its first rows every rank sends; the rest of
                their shapes, their dtypes and their device are the same on all ranks.
        """
        places, end = [], 0
        for x, lengths in parts:
            places.append(end)
            num_bytes = max(lengths) * _bytes_of_row(x)
            end += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        end = max(end, _ALIGNMENT)  # where nobody has a row, too
        sent = torch.zeros(end, dtype=torch.uint8, device=parts[0][0].device)
        for (x, lengths), place in zip(parts, places):
            flat = x[: lengths[self.rank]].contiguous().view(-1).view(torch.uint8)
            sent[place : place + len(flat)] = flat
        received = sent.new_empty(self.size * end)
        _all_gather(received, sent, group=self.group)
        by_rank = received.view(self.size, end)
        return [
            [
                by_rank[rank, place : place + length * _bytes_of_row(x)]
                .view(x.dtype)
                .view(length, *x.shape[1:])
                for rank, length in enumerate(lengths)
            ]
            for (x, lengths), place in zip(parts, places)
        ]


def _bytes_of_row(x: Tensor) -> int:
    return math.prod(x.shape[1:]) * x.element_size()


def _check(problem: Problem, backend: str, reduction: str, membership: Membership) -> None:
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
            "which is the loss of one process"
        )
    membership.check_device(problem.rows)


def _text(alike: Mapping[str, object]) -> str:
    """What must agree, one argument a line."""
    return "\n".join(f"{name}: {_kind(name, value)}" for name, value in alike.items())


def _kind(name: str, value: Any) -> str:
    if name == "self_offset" and value is not None:
        return "one"
    if not isinstance(value, Tensor):
        return repr(float(value) if name.endswith("temperature") and value is not None else value)
    if value.ndim == 0:
        return "a tensor"
    if not value.is_floating_point():
        return "integers"
    shape = ", ".join(["·", *map(str, value.shape[1:])])
    return f"{value.dtype} of shape ({shape}) on {value.device.type}"


def _agree(
    membership: Membership, text: str, failure: Exception | None, numbers: list[int]
) -> list[list[int]]:
    """Every rank's record, given that all have the same ``text`` and none has failed.

    One collective of a few numbers; only where something is wrong do the ranks send their texts.
    """
    encoded = (text if failure is None else f"{type(failure).__name__}: {failure}").encode()
    digest = int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "big", signed=True)
    record = torch.tensor([failure is not None, digest, len(encoded), *numbers])
    one_each = [len(record)] * membership.size
    (gathered,) = membership.gather([(record.to(membership.device), one_each)])
    records: list[list[int]] = torch.stack(gathered).tolist()
    if failure is None and all(r[:_LENGTH] == records[0][:_LENGTH] for r in records):
        return records
    sent = torch.frombuffer(bytearray(encoded), dtype=torch.uint8).to(membership.device)
    (texts,) = membership.gather([(sent, [record[_LENGTH] for record in records])])
    if failure is not None:
        raise failure
    said = [bytes(text.tolist()).decode() for text in texts]
    raise ValueError(_refusal([bool(record[_FAILED]) for record in records], said))


def _refusal(failed: list[bool], said: list[str]) -> str:
    """What was wrong, for those whose own arguments were right."""
    if any(failed):
        reasons = [f"rank {rank} ({said[rank]})" for rank, it in enumerate(failed) if it]
        return f"group must have every rank's arguments right, got errors from {', '.join(reasons)}"
    by_rank = [dict(line.split(": ", 1) for line in text.split("\n")) for text in said]
    names = dict.fromkeys(name for kinds in by_rank for name in kinds)
    sentences = []
    for name in names:
        ranks: dict[str, list[int]] = {}
        for rank, kinds in enumerate(by_rank):
            ranks.setdefault(kinds.get(name, "nothing"), []).append(rank)
        if len(ranks) > 1:
            came = "; ".join(f"{kind} on {_named(those)}" for kind, those in ranks.items())
            sentences.append(f"{name} must be alike on every rank of group, got {came}")
    return ". ".join(sentences)


def _named(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


# --- the loss and its gradient


def _renumbered(problem: Problem, first: int) -> Problem:
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


def _needs_statistics(problem: Problem) -> bool:
    """Whether a gradient of this rank's is made with other ranks' statistics."""
    contrasts, _ = _contrasts(problem)
    if not problem.symmetric:
        return contrasts.requires_grad
    leaves = (problem.rows, contrasts, problem.temperature_tensor)
    return any(x is not None and x.requires_grad for x in leaves)


@dataclasses.dataclass(frozen=True)
class _Gathered:
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
        problem: Problem, first_views: bool, membership: Membership, records: list[list[int]]
    ) -> _Gathered:
        """Gathers the contrasts; with them the anchors, if needed and not among the contrasts.

        Args:
            problem: this rank's own.
            first_views: whether the anchors are the first of the contrasts.
            membership, records: of all ranks.
        """
        assert problem.row_labels is not None
        needed = any(record[_NEEDS] for record in records)
        num_rows = [record[_NUM_ROWS] if needed else 0 for record in records]
        num_cols = [record[_NUM_COLS] for record in records]
        parts = [(x.detach(), num_cols) for x in _contrasts(problem)]
        own = [problem.rows.detach(), problem.row_labels]
        if needed and not (problem.square or first_views):
            parts += [(x, num_rows) for x in own]
        of_cols, of_col_labels, *of_rows = membership.gather(parts)
        cols, col_labels = [membership.own_first(xs) for xs in (of_cols, of_col_labels)]
        if problem.square:
            rows = [x[problem.num_cols :] for x in (cols, col_labels)]
        else:
            if first_views:
                of_rows = [[x[:n] for x, n in zip(xs, num_rows)] for xs in (of_cols, of_col_labels)]
            rows = [membership.without_own(xs) for xs in of_rows] or [x[:0] for x in own]
        return _Gathered(cols, col_labels, rows[0], rows[1], num_rows)

    def tensors(self) -> tuple[Tensor, ...]:
        """The fields that are tensors, in order."""
        return self.cols, self.col_labels, self.other_rows, self.other_row_labels


class _Differentiable(torch.autograd.Function):
    """The loss of all ranks' anchors, whose gradient is of this rank's rows, times the ranks."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *operands, gathered, membership, backend, reduction = arguments
        problem = whole = Problem(*operands)
        if membership.size > 1:  # its own anchors are the first of all contrasts, as of its own
            whole = dataclasses.replace(problem, cols=gathered.cols, col_labels=gathered.col_labels)
        loss, _, stats, prepared = op.forward(*whole.operands(), "none", backend)
        is_anchor, contributes = ~problem.row_ignored(), stats[1] != torch.inf
        exact = accumulation_dtype(loss)
        sums = torch.stack([x.sum(dtype=exact) for x in (loss, is_anchor, contributes)])
        parts = [(sums, [len(sums)] * membership.size), (stats.T, gathered.num_rows)]
        sums_by_rank, stats_by_rank = membership.gather(parts)
        # In the order of the ranks, so that all have the same bits.
        total, num_anchors, num_contributing = functools.reduce(torch.add, sums_by_rank)
        counts = {"mean": num_anchors, "positive_mean": num_contributing}
        count = counts.get(reduction, torch.ones_like(total)).clamp(min=1)
        other_stats = membership.without_own(stats_by_rank).T.contiguous()

        saved = (count, stats, other_stats, prepared, *gathered.tensors())
        ctx.save_for_backward(*saved, *operands[:_NUM_TENSORS])
        ctx.options = operands[_NUM_TENSORS:]
        ctx.backend, ctx.num_ranks, ctx.num_arguments = backend, membership.size, len(arguments)
        mean: Tensor = (total / count).to(loss.dtype)
        return mean

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        count, stats, other_stats, prepared, *tensors = ctx.saved_tensors
        gathered, inputs = tensors[:-_NUM_TENSORS], tensors[-_NUM_TENSORS:]
        wanted = [ctx.needs_input_grad[k] for k in (_ROWS, _COLS, _TEMPERATURE)]
        weight = grad * (ctx.num_ranks / count).to(grad.dtype)
        problem = Problem(*inputs, *ctx.options)
        if ctx.backend == "triton":
            of_all = torch.cat([stats, other_stats], dim=1)
            grads = _gradients_at_once(problem, gathered, weight, of_all, prepared, wanted)
        else:
            grads = _gradients(problem, gathered, weight, stats, other_stats, wanted, ctx.backend)
        result: list[Tensor | None] = [None] * ctx.num_arguments
        for index, want, gradient in zip((_ROWS, _COLS, _TEMPERATURE), wanted, grads):
            if want:
                result[index] = gradient.to(inputs[index])
        return tuple(result)


def _gradients(
    problem: Problem,
    gathered: Sequence[Tensor],
    weight: Tensor,
    stats: Tensor,
    other_stats: Tensor,
    wanted: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this rank's rows (n, D) and cols (m, D), of its own and of all others' losses.

    A pair with an anchor or a contrast of this rank is one of its own anchors and contrasts, of its
    anchors and the others' contrasts, or of the others' anchors and its contrasts. An anchor meets
    itself among the first alone. Where anchors are contrasts, the others are computed together,
    and each rank has half of what they give to the temperature.

    Args:
        problem: this rank's own.
        gathered: the tensors of ``_Gathered``.
        weight: 0-dim gradient of every anchor's loss.
        stats: (3, n) of this rank's anchors.
        other_stats: (3, N - n) of the others'; none where no rank wants its contrasts' gradient.
        wanted: whether the rows', the cols' and the temperature's gradients are.
        backend: made the statistics.
    """
    wants_rows, wants_cols, wants_temperature = wanted
    problem = _widened(problem)  # the parts are rounded once, in the end
    cols, labels = _contrasts(problem)
    *of_cols, other_rows, other_row_labels = gathered
    other_cols, other_col_labels = [x[problem.num_cols :] for x in of_cols]
    num_others, one = other_stats.shape[1], torch.ones_like(weight)

    def block(problem: Problem, stats: Tensor, needs: Sequence[bool], *of_cols: Tensor) -> Any:
        # The weight is of the sum of all losses, of which no count is taken any more.
        call = (weight, one, stats, None, *needs, *problem.operands(), "sum", backend, *of_cols)
        return [grad.to(problem.dtype) for grad in op.backward(*call)]

    grad_rows, grad_cols, grad_tau = block(problem, stats, wanted)
    if len(other_cols) and (wants_rows or wants_temperature):
        against_others = dataclasses.replace(
            problem, cols=other_cols.to(cols), col_labels=other_col_labels, self_offset=None
        )
        needs = (wants_rows, False, wants_temperature)
        both = (weight, other_stats) if problem.square and num_others else ()
        more = block(against_others, stats, needs, *both)
        grad_rows, grad_tau = grad_rows + more[0], grad_tau + more[2]
    if num_others and wants_cols:
        of_others = dataclasses.replace(
            problem,
            rows=other_rows.to(cols),
            row_labels=other_row_labels,
            cols=cols,
            col_labels=labels,
            self_offset=None,
        )
        grad_cols = grad_cols + block(of_others, other_stats, (False, True, False))[1]
    return grad_rows, grad_cols, grad_tau


def _gradients_at_once(
    problem: Problem,
    gathered: Sequence[Tensor],
    weight: Tensor,
    stats: Tensor,
    prepared: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``_gradients``, by the backend that takes all contrasts at once, as the forward prepared them.

    The gradient of contrasts that are no anchors needs the anchors of all ranks: these, and the
    rank's own contrasts, are prepared for it.

    Args:
        problem, gathered, weight, wanted: as there.
        stats: (5, N) of all anchors, this rank's own first.
        prepared: what the forward made of this rank's rows and of all contrasts.
    """
    wants_rows, wants_cols, wants_temperature = wanted
    cols, labels, other_rows, other_row_labels = gathered
    num_rows, num_all, one = problem.num_rows, stats.shape[1], torch.ones_like(weight)
    whole, both = problem, False
    if len(cols) > problem.num_cols:
        whole = dataclasses.replace(problem, cols=cols, col_labels=labels)
        both = problem.square and num_all == len(cols)
    is_alone = whole is problem and num_all == num_rows
    needs = (wants_rows, wants_cols and is_alone, wants_temperature)
    call = (weight, one, stats[:, :num_rows], prepared, *needs)
    of_cols = (weight, stats) if both else ()
    grads = op.backward(*call, *whole.operands(), "sum", "triton", *of_cols)
    grad_rows, grad_cols, grad_tau = (grad.to(problem.dtype) for grad in grads)
    if wants_cols and not is_alone:
        assert problem.cols is not None and problem.row_labels is not None
        assert problem.col_labels is not None
        # The others' anchors first, the rank's own contrasts among its anchors first: so no other
        # anchor is in the place of one that is itself a contrast.
        own, num_others = problem.self_offset or 0, num_all - num_rows
        against = dataclasses.replace(
            problem,
            rows=torch.cat([other_rows.to(problem.rows), problem.rows]),
            row_labels=torch.cat([other_row_labels, problem.row_labels]),
            cols=problem.cols.roll(-own, 0),
            col_labels=problem.col_labels.roll(-own, 0),
            self_offset=None if problem.self_offset is None else -num_others,
        )
        of_all = (weight, one, stats.roll(num_others, 1), None, False, True, False)
        _, of_own, _ = op.backward(*of_all, *against.operands(), "sum", "triton")
        grad_cols = of_own.to(problem.dtype).roll(own, 0)
    return grad_rows, grad_cols, grad_tau


def _widened(problem: Problem) -> Problem:
    """The problem with features of the working dtype."""
    cols = problem.cols
    return dataclasses.replace(
        problem,
        rows=problem.rows.to(problem.dtype),
        cols=None if cols is None else cols.to(problem.dtype),
    )
