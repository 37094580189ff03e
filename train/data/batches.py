"""The loaders of batches: of an epoch's order in training, of every image once in evaluation."""

import math
import os

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.images import Crops, Split
from data.order import BalancedOrder, PlacedOrder, TrainingOrder
from run.errors import UserError


def training_batches(
    split: Split | Crops,
    *,
    batch_size: int,
    seed: int,
    workers: int,
    classes_per_batch: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[TrainingOrder, DataLoader[tuple[Tensor, Tensor]]]:
    """The order of a split's batches, and the loader that fetches them, or crops, in that order.

    Raises:
        UserError: there are too few images for a batch, or classes for `classes_per_batch`, or a
            batch cannot be shared out among `world_size` processes.
    """
    if batch_size > len(split):
        raise UserError(
            f"--batch_size {batch_size} is larger than the training set of {len(split)} images"
        )
    if batch_size % world_size != 0:
        raise UserError(
            f"--batch_size {batch_size} is no multiple of the {world_size} processes that share it"
        )
    place = {"rank": rank, "world_size": world_size}
    if classes_per_batch is None:
        order = TrainingOrder(len(split), batch_size, seed, **place)
        return order, _loader(split, order, workers)
    num_classes = split.labels.unique().numel()
    if classes_per_batch > num_classes:
        raise UserError(
            f"--classes_per_batch {classes_per_batch}: the training set has {num_classes} classes"
        )
    order = BalancedOrder(
        split.labels, batch_size, seed, classes_per_batch=classes_per_batch, **place
    )
    return order, _loader(split, order, workers)


def sequential_batches(
    split: Split, *, batch_size: int, workers: int, rank: int = 0, world_size: int = 1
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Every image once, in order; of several processes as many batches each, one after another.

    Where they do not come out even, the last batch is repeated after itself.
    """
    batches = [part.tolist() for part in torch.arange(len(split)).split(batch_size)]
    share = math.ceil(len(batches) / world_size)
    batches = [
        batches[min(number, len(batches) - 1)] for number in range(rank * share, (rank + 1) * share)
    ]
    in_memory = isinstance(split.images, Tensor)
    return _loader(split, batches, 0 if in_memory else workers)


def _loader(
    split: Split | Crops, batches: TrainingOrder | list[list[int]], workers: int
) -> DataLoader[tuple[Tensor, Tensor]]:
    placed = isinstance(split, Crops) and isinstance(batches, TrainingOrder)
    return DataLoader(
        split,
        batch_size=None,
        sampler=PlacedOrder(batches) if placed else batches,
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
