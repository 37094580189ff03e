"""The processes of one run, as torchrun starts them: who is who, and what they tell each other.

A process alone hears of nobody and waits for nobody: what it does reads the same as of many.
"""

import gc
import io
import os
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist

# DDP imports it, and its defaults hold the group that is there at its import: so before any.
import torch.distributed.nn
from torch import Tensor, nn

from run.errors import UserError

T = TypeVar("T")
# The name that torch has given it, and the one of versions before.
_all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
# Older versions of torch have no other.
_abort: Any = getattr(dist.distributed_c10d, "_abort_process_group", dist.destroy_process_group)
# How long a rank that ends waits for what another has to say of it, in seconds.
PATIENCE = 3.0
# Why one of the others ends, and that the first says so.
REASON, SPOKEN = "reason", "spoken"


@dataclass(eq=False)
class Ranks:
    """This process among those of its run. Every process makes the calls of all methods, in order.

    Attributes:
        rank: its number, of world_size; the first, 0, alone writes and speaks.
        local_rank: its number on its host.
        group: of all; None for a process alone. What lies in main memory goes over Gloo, also beside
            NCCL: no process waits for its GPU to hear of the others.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    group: dist.ProcessGroup | None = None

    def __str__(self) -> str:
        return f"process {self.rank} of {self.world_size}"

    @property
    def is_rank_0(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def seed_key(self) -> tuple[int, ...]:
        """What tells the seeds of this process from the others'; alone nothing."""
        return () if self.group is None else (self.rank,)

    def own_device(self, device: torch.device) -> torch.device:
        """Of the GPUs of this host the one that is for this process."""
        several = self.group is not None and device.type == "cuda"
        return torch.device("cuda", _own_gpu(self.local_rank)) if several else device

    def parallel(self, network: nn.Module) -> nn.Module:
        """The network, whose gradients are averaged in its backward."""
        if self.group is None:
            return network
        return nn.parallel.DistributedDataParallel(network, process_group=self.group)

    def max(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.group is None:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.group)
        return int(numbers)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of the processes' tensors, on the device of the run."""
        if self.group is None:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total, group=self.group)
        return total / self.world_size

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors on the device of the run by those of the first process."""
        if self.group is not None:
            for tensor in tensors:
                dist.broadcast(tensor, src=0, group=self.group)

    def all_gather(self, thing: T) -> list[T]:
        """What each process gave, in their order."""
        if self.group is None:
            return [thing]
        things: list[Any] = [None] * self.world_size
        dist.all_gather_object(things, thing, group=self.group)
        return things

    def all_gather_rows(self, rows: Tensor) -> Tensor:
        """The rows (n, ...) of all processes, of each as many, in their order."""
        if self.group is None:
            return rows
        rows = rows.contiguous()  # NCCL sends memory as it lies
        gathered = rows.new_empty(self.world_size * len(rows), *rows.shape[1:])
        _all_gather(gathered, rows, group=self.group)
        return gathered

    def from_rank_0(self, act: Callable[[], T]) -> T:
        """What `act` returns on the first process, which alone calls it.

        A mistake of the user that it finds is raised by all.
        """
        if self.group is None:
            return act()
        said: list[Any] = [None, None]
        if self.is_rank_0:
            try:
                said[0] = act()
            except UserError as error:
                said[1] = error
        dist.broadcast_object_list(said, src=0, group=self.group)
        found: T
        found, mistake = said
        if mistake is not None:
            raise mistake
        return found

    @contextmanager
    def local_rank_0_first(self) -> Iterator[None]:
        """Let the others of a host enter once the first of each host has left."""
        if self.local_rank > 0:
            self.max(0)
        yield
        if self.local_rank == 0:
            self.max(0)


ALONE = Ranks()


@contextmanager
def local_rank_0_speaks() -> Iterator[None]:
    """For what every process does before it is joined: one of each host says what is wrong.

    torchrun ends the others once that one has ended; one that it does not end speaks, too.
    """
    if "RANK" not in os.environ or int(os.environ.get("LOCAL_RANK", 0)) == 0:
        yield
        return
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            yield
    except (UserError, SystemExit) as error:
        if isinstance(error, UserError) or error.code != 0:
            time.sleep(2 * PATIENCE)
            sys.stderr.write(said.getvalue())
        raise


@contextmanager
def joined(device: torch.device, *, timeout_minutes: float) -> Iterator[Ranks]:
    """While entered, the processes that torchrun started are connected; alone without torchrun.

    However it is left, the connections are closed, which those that wait for this process notice at
    once. What ends the run is said by one: the first process if it is reached.

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
    if device.type == "cuda" and _own_gpu(local_rank) >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this host has no GPU to itself, there are "
            f"{torch.cuda.device_count()}: give torchrun --nproc-per-node as many"
        )
    if device.type not in ("cpu", "cuda"):
        with local_rank_0_speaks():
            raise UserError(f"--device {device.type} trains in one process: choose --device cpu")
    ranks, store, failure = Ranks(rank, world_size, local_rank), None, None
    try:
        if device.type == "cuda":
            torch.cuda.set_device(_own_gpu(local_rank))
        timeout = timedelta(minutes=timeout_minutes)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store, *_ = next(dist.rendezvous("env://", timeout=timeout))
        store = _of_this_start(store, rank, world_size, timeout)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout
        )
        ranks.group = cast(dist.ProcessGroup, dist.group.WORLD)
        with nullcontext() if ranks.is_rank_0 else _silence():
            yield ranks
    except (UserError, RuntimeError) as error:
        if not isinstance(error, UserError) and not _is_of_others(error):
            raise
        failure = error
    finally:
        ended_by = failure or sys.exc_info()[1]
        if isinstance(ended_by, Exception) and not _is_of_others(ended_by):
            reason = str(ended_by) or type(ended_by).__name__
            _post(store, SPOKEN if ranks.is_rank_0 else REASON, f"{ranks}: {reason}")
        _disconnect(ranks, ended_by)
    if failure is not None:
        _raise_once(failure, store, ranks, timeout_minutes)


def _own_gpu(local_rank: int) -> int:
    """The number of a process's GPU among those that it sees."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    # Slurm shows each task its own (--gpus-per-task=1); torchrun shows all processes the same.
    own_alone = len(seen) == 1 and seen != [""] and "TORCHELASTIC_RUN_ID" not in os.environ
    return 0 if own_alone else local_rank


@contextmanager
def _silence() -> Iterator[None]:
    # Of warnings, too: what holds for all ranks is said by the first.
    with open(os.devnull, "w") as out, redirect_stdout(out), redirect_stderr(out):
        yield


def _post(store: dist.Store | None, key: str, text: str) -> None:
    """Leave a word for the others."""
    with suppress(RuntimeError):  # the store was on a host that is gone
        if store is not None:
            store.set(key, text)


def _posted(store: dist.Store | None, key: str, *, seconds: float) -> str | None:
    """The word that another has left, or None if none comes for so long."""
    with suppress(RuntimeError):
        if store is not None:
            store.wait([key], timedelta(seconds=seconds))
            return store.get(key).decode()
    return None


def _disconnect(ranks: Ranks, error: BaseException | None) -> None:
    """Close every connection now.

    A process that ends with one open may be aborted by a thread of Gloo that still holds a tensor.
    A connection is closed with the last reference to its group: the frames of an error hold some,
    and those of the errors behind it.
    """
    errors = [] if error is None else [error]
    for one in errors:
        traceback.clear_frames(one.__traceback__)
        behind = (one.__cause__, one.__context__)
        errors += [other for other in behind if other is not None and other not in errors]
    # NCCL would wait for what the others have not sent.
    waits = (
        error is not None
        and ranks.group is not None
        and "nccl" in dist.get_backend_config(ranks.group)
    )
    ranks.group = None
    if dist.is_initialized():
        (_abort if waits else dist.destroy_process_group)()
    gc.collect()


def _raise_once(
    error: UserError | RuntimeError,
    store: dist.Store | None,
    ranks: Ranks,
    timeout_minutes: float,
) -> NoReturn:
    """Raise what ends this rank as a mistake of the user; if the first speaks, exit in silence.

    The first says why another has ended if it only lost the others.
    """
    if ranks.is_rank_0 and isinstance(error, UserError):
        raise error
    if not isinstance(error, UserError):
        reason = " ".join(str(error).split())
        error = UserError(
            f"{ranks} lost the others: one has ended, cannot be reached, or kept it waiting for "
            f"{timeout_minutes:g} minutes (--timeout_minutes); the first to have ended says why. "
            f"{reason}"
        )
    if ranks.is_rank_0:
        of_another = _posted(store, REASON, seconds=PATIENCE)
        _post(store, SPOKEN, "")
        raise UserError(of_another) if of_another else error
    if _posted(store, SPOKEN, seconds=2 * PATIENCE) is not None:
        time.sleep(0.5)  # torchrun ends all when one has ended: the first must have spoken
        raise SystemExit(1)
    raise error


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


def _is_of_others(error: BaseException) -> bool:
    # Gloo raises its errors as plain RuntimeErrors that begin with the place in its source.
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or "gloo" in str(error)
    )
