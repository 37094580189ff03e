"""The loaders of batches: of an epoch's order in training, of every image once in evaluation.

A worker decodes a part of a batch: the first of an epoch is there as soon as all together can make it.
"""

import math
import os
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from data.corrupted import Corrupted
from data.images import Crops, Split
from data.order import BalancedOrder, PlacedOrder, TrainingOrder
from data.prefetch import on_device_ahead
from run.errors import UserError
from run.processes import ALONE, Ranks
from run.rules import LARGEST, broken, out_of_range


@dataclass
class BatchOptions:
    """Batches.

    Args:
        batch_size: Images per step, summed over all processes.
        classes_per_batch: Number of classes in each batch, with the same number of images of each.
            Default: batches are drawn from all images.
        workers: Processes that load and decode images, per training process (8 GPUs with 4 workers
            each: 32). 0: the training process does it. The results do not depend on it.
    """

    batch_size: int = 128
    classes_per_batch: int | None = None
    workers: int = 0

    def mistakes(self) -> list[str]:
        """What is out of range or contradicts itself, one sentence each."""
        rules = [
            (
                self.classes_per_batch is None or self.classes_per_batch > 1,
                f"--classes_per_batch {self.classes_per_batch}: must be at least 2, one class alone "
                "has nothing to tell apart",
            ),
            (
                not self.classes_per_batch or self.batch_size % self.classes_per_batch == 0,
                f"--batch_size {self.batch_size} is no multiple of "
                f"--classes_per_batch {self.classes_per_batch}",
            ),
        ]
        return broken(rules) + out_of_range(
            self,
            at_least={"batch_size": 2, "workers": 0},
            at_most={"batch_size": LARGEST, "workers": 1000},
        )


# Images that a worker decodes at a time, and how many times so many it is ahead.
IMAGES_PER_PART = 32
PARTS_AHEAD = 2
SHARED_MEMORY = Path("/dev/shm")
CPU = torch.device("cpu")


def training_batches(
    split: Split | Crops,
    options: BatchOptions,
    *,
    seed: int,
    ranks: Ranks = ALONE,
    device: torch.device = CPU,
) -> tuple[TrainingOrder, "Batches"]:
    """The order of a split's batches, and those on a device, or their crops, in that order.

    Raises:
        UserError: there are too few images for a batch, or classes for `classes_per_batch`, or a
            batch cannot be shared out among the processes.
    """
    batch_size, classes_per_batch = options.batch_size, options.classes_per_batch
    if batch_size > len(split):
        raise UserError(
            f"--batch_size {batch_size} is larger than the training set of {len(split)} images"
        )
    if batch_size % ranks.world_size != 0:
        raise UserError(
            f"--batch_size {batch_size} is no multiple of the {ranks.world_size} processes that "
            "share it"
        )
    place = {"rank": ranks.rank, "world_size": ranks.world_size}
    if classes_per_batch is None:
        order = TrainingOrder(len(split), batch_size, seed, **place)
        return order, Batches(split, order, options.workers, device)
    num_classes = split.labels.unique().numel()
    if classes_per_batch > num_classes:
        raise UserError(
            f"--classes_per_batch {classes_per_batch}: the training set has {num_classes} classes"
        )
    order = BalancedOrder(
        split.labels, batch_size, seed, classes_per_batch=classes_per_batch, **place
    )
    return order, Batches(split, order, options.workers, device)


def sequential_batches(
    split: Split | Corrupted,
    *,
    batch_size: int,
    workers: int,
    ranks: Ranks = ALONE,
    device: torch.device = CPU,
) -> "Batches":
    """Every image once, in order; of several processes as many batches each, one after another.

    Where they do not come out even, the last batch is repeated after itself.
    """
    batches = [part.tolist() for part in torch.arange(len(split)).split(batch_size)]
    share = math.ceil(len(batches) / ranks.world_size)
    first = ranks.rank * share
    batches = [batches[min(number, len(batches) - 1)] for number in range(first, first + share)]
    return Batches(split, batches, 0 if split.in_memory else workers, device)


class Batches:
    """The batches of a split on a device, in order, which workers fetch.

    Raises:
        UserError: the parts that the workers hold do not fit in shared memory.
    """

    def __init__(
        self,
        split: Split | Crops | Corrupted,
        batches: TrainingOrder | list[list[int]],
        workers: int,
        device: torch.device,
    ) -> None:
        self.device = device
        self.batches = batches
        sampler: Sampler[list[Any]] | list[list[int]] = batches
        if isinstance(split, Crops) and isinstance(batches, TrainingOrder):
            sampler = PlacedOrder(batches)
        size = len(split) if split.in_memory or workers == 0 else IMAGES_PER_PART
        self.parts = _Parts(sampler, size)
        if workers > 0:
            longest = _longest(batches)
            # The parts that wait, and those of the batch that is being joined.
            num_images = workers * PARTS_AHEAD * min(size, longest) + longest
            _check_shared_memory(workers, num_images * split.image_bytes)
        self.loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
            split,
            batch_size=None,
            sampler=self.parts,
            num_workers=workers,
            prefetch_factor=PARTS_AHEAD if workers > 0 else None,
            persistent_workers=workers > 0,
            worker_init_fn=_leave_process_group,
            # A generator of its own keeps the loader from drawing on the global random state.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return on_device_ahead(self._joined(), self.device)

    def _joined(self) -> Iterator[tuple[Tensor, Tensor]]:
        parts = iter(self.loader)
        for first in parts:
            batch = [first, *(next(parts) for _ in range(self.parts.counts.popleft() - 1))]
            del first
            images, labels = map(self._join, zip(*batch))
            del batch  # parts lie in shared memory for as long as somebody holds them
            yield images, labels
            del images, labels

    def _join(self, parts: Sequence[Tensor]) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        shape = (sum(map(len, parts)), *parts[0].shape[1:])
        # To where a GPU takes it from.
        pin = self.device.type == "cuda"
        return torch.cat(list(parts), out=torch.empty(shape, dtype=parts[0].dtype, pin_memory=pin))


class _Parts(Sampler[list[Any]]):
    """The indices of batches in parts of up to `size`; `counts` is how many each batch has."""

    def __init__(self, batches: Sampler[list[Any]] | list[list[int]], size: int) -> None:
        self.batches = batches
        self.size = size
        self.counts: deque[int] = deque()

    def __iter__(self) -> Iterator[list[Any]]:
        self.counts.clear()
        for batch in self.batches:
            parts = [batch[start : start + self.size] for start in range(0, len(batch), self.size)]
            self.counts.append(len(parts))
            yield from parts


def _longest(batches: TrainingOrder | list[list[int]]) -> int:
    if isinstance(batches, TrainingOrder):
        return batches.batch_size // batches.world_size
    return max(map(len, batches), default=0)


def _check_shared_memory(workers: int, num_bytes: int) -> None:
    """Refuse workers whose images, on their way to this process, have no room."""
    if not SHARED_MEMORY.is_dir():
        return
    needed = num_bytes * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise UserError(
            f"--workers {workers} needs {needed / 2**20:.0f} MiB of shared memory, and "
            f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB free: lower --workers, or enlarge it "
            "(of a container by --shm-size)"
        )


def _leave_process_group(worker: int) -> None:
    # torchrun, timeout and terminals signal the whole group of a process. The main process
    # finishes its step then, for which it needs its workers; they end when it does.
    if hasattr(os, "setpgrp"):
        os.setpgrp()
