"""Ranks of a process group: which are meant, how they agree on a call, and how they send rows."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# What a rank says first, before its numbers: whether it failed, and what must agree.
_FAILED, _DIGEST, _LENGTH, _NUM_FIRST = range(4)
# The name that torch has given it, and the one of versions before.
_all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
_ALIGNMENT = 8  # bytes: of the widest elements that are sent


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
        text = text_of({**dict(zip(("features", "labels"), rows)), "size": len(queue)})
    except Exception as error:  # whatever it is, the other ranks must hear of it
        failure = error
    records = agree(membership, text, failure, [len(rows[0]) if rows else 0])
    assert rows is not None
    lengths = [length for (length,) in records]
    features, labels = membership.gather([(x.detach(), lengths) for x in rows])
    return torch.cat(features), torch.cat(labels)


class Part(NamedTuple):
    """A rank's part in a call: its rows and columns, and whether a gradient of its is wanted, 1 or 0.

    Attributes:
        num_rows, num_cols: how many it has.
        wants_rows: the rows' gradient or the temperature's.
        wants_cols: the columns', which may be the rows.
    """

    num_rows: int = 0
    num_cols: int = 0
    wants_rows: int = 0
    wants_cols: int = 0


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

    def exchange(self, x: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """What every rank has for this rank, by rank, in one collective.

        Args:
            x: rows for each rank, in the order of the ranks; the rest of its shape, its dtype and its
                device are the same on all ranks.
            lengths: how many of them each rank gets from every other.
        """
        own = lengths[self.rank]
        received = x.new_empty(self.size * own, *x.shape[1:])
        if sum(lengths):
            splits = ([own] * self.size, list(lengths))
            dist.all_to_all_single(received, x.contiguous(), *splits, group=self.group)
        return list(received.view(self.size, own, *x.shape[1:]))


def _bytes_of_row(x: Tensor) -> int:
    return math.prod(x.shape[1:]) * x.element_size()


def text_of(alike: Mapping[str, object]) -> str:
    """What must agree, one argument a line."""
    text, sizes = text_and_sizes(alike)
    return text.format(*sizes)


def text_and_sizes(alike: Mapping[str, object]) -> tuple[str, list[int]]:
    """The text with {} in the place of each size, which in a trace may be known by name alone."""
    text = "\n".join(f"{name}: {_kind(name, value)}" for name, value in alike.items())
    return text, [size for value in alike.values() for size in _sizes(value)]


def _sizes(value: object) -> Sequence[int]:
    """Of a tensor of numbers, each but how many rows it has."""
    return value.shape[1:] if isinstance(value, Tensor) and value.is_floating_point() else ()


def _kind(name: str, value: Any) -> str:
    if name == "self_offset" and value is not None:
        return "one"
    if not isinstance(value, Tensor):
        return repr(float(value) if name.endswith("temperature") and value is not None else value)
    if value.ndim == 0:
        return "a tensor"
    if not value.is_floating_point():
        return "integers"
    shape = ", ".join(["·", *["{}"] * (value.ndim - 1)])
    return f"{value.dtype} of shape ({shape}) on {value.device.type}"


def agree(
    membership: Membership, text: str, failure: Exception | None, numbers: Sequence[int]
) -> list[list[int]]:
    """Every rank's numbers, given that all have the same ``text`` and none has failed.

    One collective of a few numbers; only where something is wrong do the ranks send their texts.
    """
    encoded = (text if failure is None else f"{type(failure).__name__}: {failure}").encode()
    digest = int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "big", signed=True)
    record = torch.tensor([failure is not None, digest, len(encoded), *numbers])
    one_each = [len(record)] * membership.size
    (gathered,) = membership.gather([(record.to(membership.device), one_each)])
    records: list[list[int]] = torch.stack(gathered).tolist()
    if failure is None and all(r[:_LENGTH] == records[0][:_LENGTH] for r in records):
        return [r[_NUM_FIRST:] for r in records]
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
