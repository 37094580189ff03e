"""The loaders of batches: of an epoch's order in training, of every image once in evaluation."""

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.images import Crops, Split
from data.order import BalancedOrder, PlacedOrder, TrainingOrder
from run.errors import UserError
from run.processes import ALONE, Ranks
from run.rules import LARGEST, broken, out_of_range


@dataclass
class BatchOptions:
    """Batches.

    Args:
        batch_size: Images per step, of all processes together, each in num_views views.
        classes_per_batch: Have every batch hold so many classes, with equally many images of each.
            Default: batches are drawn from all images alike.
        workers: Processes that load (and for imagefolder and webdataset decode) images, for each
            training process (of torchrun: 8 GPUs with 4 workers each are 32); 0: the training
            process itself. The results do not depend on it.
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


def training_batches(
    split: Split | Crops, options: BatchOptions, *, seed: int, ranks: Ranks = ALONE
) -> tuple[TrainingOrder, DataLoader[tuple[Tensor, Tensor]]]:
    """The order of a split's batches, and the loader that fetches them, or crops, in that order.

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
        return order, _loader(split, order, options.workers)
    num_classes = split.labels.unique().numel()
    if classes_per_batch > num_classes:
        raise UserError(
            f"--classes_per_batch {classes_per_batch}: the training set has {num_classes} classes"
        )
    order = BalancedOrder(
        split.labels, batch_size, seed, classes_per_batch=classes_per_batch, **place
    )
    return order, _loader(split, order, options.workers)


def sequential_batches(
    split: Split, *, batch_size: int, workers: int, ranks: Ranks = ALONE
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Every image once, in order; of several processes as many batches each, one after another.

    Where they do not come out even, the last batch is repeated after itself.
    """
    batches = [part.tolist() for part in torch.arange(len(split)).split(batch_size)]
    share = math.ceil(len(batches) / ranks.world_size)
    first = ranks.rank * share
    batches = [batches[min(number, len(batches) - 1)] for number in range(first, first + share)]
    in_memory = isinstance(split.images, Tensor)
    return _loader(split, batches, 0 if in_memory else workers)


def _loader(
    split: Split | Crops, batches: TrainingOrder | list[list[int]], workers: int
) -> DataLoader[tuple[Tensor, Tensor]]:
    sampler: Any = batches
    if isinstance(split, Crops) and isinstance(batches, TrainingOrder):
        sampler = PlacedOrder(batches)
    return DataLoader(
        split,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_leave_process_group,
        # A generator of its own keeps the loader from drawing on the global random state.
        generator=torch.Generator(),
    )


def _leave_process_group(worker: int) -> None:
    # torchrun, timeout and terminals signal the whole group of a process. The main process
    # finishes its step then, for which it needs its workers; they end when it does.
    if hasattr(os, "setpgrp"):
        os.setpgrp()
