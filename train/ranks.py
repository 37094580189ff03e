"""The processes of one run, as torchrun starts them: who is who, and what they tell each other.

A process alone hears of nobody and waits for nobody: what it does reads the same as of many.
"""

import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from config import UserError

T = TypeVar("T")
# The name that torch has given it, and the one of versions before.
_all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run. Every process makes the calls of all methods, in order.

    Attributes:
        rank: its number, of world_size; the first, 0, alone writes and speaks.
        local_rank: its number on its host.
        group: of all, for tensors on the device of the run; None for a process alone.
        control: of all, for what lies in main memory.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    group: dist.ProcessGroup | None = None
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def seed_key(self) -> tuple[int, ...]:
        """What tells the seeds of this process from the others'; alone nothing."""
        return () if self.group is None else (self.rank,)

    def own_device(self, device: torch.device) -> torch.device:
        """Of the GPUs of this host the one that is for this process."""
        several = self.group is not None and device.type == "cuda"
        return torch.device("cuda", self.local_rank) if several else device

    def parallel(self, network: nn.Module) -> nn.Module:
        """The network, whose gradients are averaged in its backward."""
        if self.group is None:
            return network
        # Else DDP sorts its buckets anew after its first step: a run that goes on would add up that
        # step's gradients in another order than one never stopped. It warns once if none is unused.
        return nn.parallel.DistributedDataParallel(
            network, find_unused_parameters=True, process_group=self.group
        )

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.control is None:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.control)
        return int(numbers)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of the processes' tensors, on the device of the run."""
        if self.group is None:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total, group=self.group)
        return total / self.world_size

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors on the device of the run by those of the first process."""
        if self.group is not None:
            for tensor in tensors:
                dist.broadcast(tensor, src=0, group=self.group)

    def gather(self, thing: T) -> list[T]:
        """What each process gave, in their order."""
        if self.control is None:
            return [thing]
        things: list[Any] = [None] * self.world_size
        dist.all_gather_object(things, thing, group=self.control)
        return things

    def gather_rows(self, rows: Tensor, num_rows: int) -> Tensor:
        """The (n, D) rows of all processes, in their order, each filled up to `num_rows`."""
        if self.group is None:
            return rows
        rows = F.pad(rows, (0, 0, 0, num_rows - len(rows)))
        gathered = rows.new_empty(self.world_size * num_rows, *rows.shape[1:])
        _all_gather(gathered, rows, group=self.group)
        return gathered

    def from_first(self, act: Callable[[], T]) -> T:
        """What `act` returns on the first process, which alone calls it.

        A mistake of the user that it finds ends the others in silence.
        """
        if self.control is None:
            return act()
        said: list[Any] = [None, None]
        if self.is_main:
            try:
                said[0] = act()
            except UserError as error:
                said[1] = error
        dist.broadcast_object_list(said, src=0, group=self.control)
        if said[1] is not None:
            raise said[1] if self.is_main else SystemExit(1)
        return said[0]

    @contextmanager
    def one_per_host_first(self) -> Iterator[None]:
        """Let the others of a host enter once the first of each host has left."""
        if self.local_rank > 0:
            self.largest(0)
        yield
        if self.local_rank == 0:
            self.largest(0)


ALONE = Ranks()


@contextmanager
def joined(device: torch.device, *, timeout_minutes: float) -> Iterator[Ranks]:
    """While entered, the processes that torchrun started are connected; alone without torchrun.

    Args:
        device: of each one's own tensors; of several GPUs each process takes another.
        timeout_minutes: how long one waits for another.

    Raises:
        UserError: they cannot be connected; while entered, the others cannot be reached any more.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    if world_size == 1:
        yield ALONE
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", 0))
    if device.type == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this host has no GPU to itself, there are "
            f"{torch.cuda.device_count()}: give torchrun --nproc-per-node as many"
        )
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device.type} trains in one process: choose --device cpu")
    try:
        if device.type == "cuda":
            torch.cuda.set_device(local_rank)
        timeout = timedelta(minutes=timeout_minutes)
        backend = "nccl" if device.type == "cuda" else "gloo"
        store, *_ = next(dist.rendezvous("env://", timeout=timeout))
        store = _of_this_start(store, rank, world_size, timeout)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout
        )
        control = dist.new_group(backend="gloo", timeout=timeout)
        ranks = Ranks(rank, world_size, local_rank, dist.group.WORLD, control)
        with (
            nullcontext(sys.stdout) if ranks.is_main else open(os.devnull, "w") as out,
            redirect_stdout(out),
        ):
            yield ranks
    except RuntimeError as error:
        if not _is_of_others(error):
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"process {rank} of {world_size} lost the others: one has ended, cannot be reached, or "
            f"kept it waiting for {timeout_minutes:g} minutes (--timeout_minutes); the first to "
            f"have ended says why. {reason}"
        ) from error
    # Not after an error: it would wait for processes that are gone.
    dist.destroy_process_group()


def _of_this_start(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """The part of a store that holds nothing of processes that ended.

    torchrun keeps its store when it starts processes again, and with it the addresses of those
    before; how often it did so its hosts count differently. So the first process names the part, in
    answer to a word of each other that was never said before.
    """
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello {rank}", name)
        store.wait([f"welcome {name}"], timeout)
        name = store.get(f"welcome {name}").decode()
        store.set(f"{name} {rank}", "")
        return dist.PrefixStore(name, store)
    missing, deadline = set(range(1, world_size)), time.monotonic() + timeout.total_seconds()
    while missing:
        for other in list(missing):
            if store.check([f"{name} {other}"]):
                missing.remove(other)
            elif store.check([f"hello {other}"]):  # perhaps of one that ended; then another comes
                store.set(f"welcome {store.get(f'hello {other}').decode()}", name)
        if time.monotonic() > deadline:
            raise dist.DistError(f"processes {sorted(missing)} did not come")
        time.sleep(0.02)
    return dist.PrefixStore(name, store)


def _is_of_others(error: RuntimeError) -> bool:
    # Gloo raises its errors as plain RuntimeErrors that begin with the place in its source.
    return isinstance(error, dist.DistError) or "gloo" in str(error)
