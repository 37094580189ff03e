"""Images in memory or in files, and the batches of them that training and evaluation see.

The order of training is a pure function of (seed, epoch), and a crop of (seed, epoch, place in that
order, view), whatever the number of workers; several processes share out the batches that one would
see.
"""

import hashlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as transforms

from config import UserError
from seeds import seed_of
from shards import ShardFile


class ImageFiles:
    """Images decoded when asked for: shorter side to `size`, centre square, RGB or grey.

    Args:
        files: paths, or files within a shard.
    """

    def __init__(self, files: list[str] | list[ShardFile], size: int, channels: int = 3) -> None:
        self.files = files
        self.size = size
        self.channels = channels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices: list[int]) -> Tensor:
        return torch.stack([self._square(self.decode(index)) for index in indices])

    def decode(self, index: int) -> Image.Image:
        """A whole image, as large as it is stored.

        Raises:
            UserError: it cannot be read.
        """
        file = self.files[index]
        try:
            with Image.open(file if isinstance(file, str) else file.open()) as stored:
                image = _to_rgb(stored)
                return image if self.channels == 3 else image.convert("L")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            # Pillow calls a file in memory by its address.
            reason = re.sub(r" <_io.BytesIO .*>", "", str(error))
            raise UserError(f"cannot read the image {file}: {reason}") from error

    def _square(self, image: Image.Image) -> Tensor:
        image = transforms.resize(image, [self.size], antialias=True)
        return transforms.pil_to_tensor(transforms.center_crop(image, [self.size]))


def _to_rgb(image: Image.Image) -> Image.Image:
    # Pillow clips deeper grey values at 255 instead of scaling them.
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no fixed white; save it in 8 or 16 bits a channel")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


@dataclass(frozen=True, eq=False)
class Split(Dataset[tuple[Tensor, Tensor]]):
    """Images of one stored size S and their labels (N,).

    Indexed by a list of B indices it gives ((B, C, S, S) uint8, (B,)).

    Args:
        originals: the same images in memory, as large as they came, where that is larger than S.
    """

    images: Tensor | ImageFiles
    labels: Tensor
    originals: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]

    @cached_property
    def order(self) -> str:
        """A hash of the labels, and of the files by their names, in their order."""
        digest = hashlib.sha256(str(self.labels.tolist()).encode())
        if not isinstance(self.images, Tensor):
            for file in self.images.files:
                name = file if isinstance(file, str) else file.name
                digest.update(f"{os.path.basename(name)}/".encode(errors="surrogateescape"))
        return digest.hexdigest()

    @property
    def stored_size(self) -> int:
        """S, the side of the stored images."""
        return self.images.shape[-1] if isinstance(self.images, Tensor) else self.images.size

    def take(self, indices: list[int]) -> "Split":
        """The split of these images alone."""
        if isinstance(self.images, Tensor):
            originals = None if self.originals is None else self.originals[indices]
            return Split(self.images[indices], self.labels[indices], originals)
        files = [self.images.files[index] for index in indices]
        return Split(
            ImageFiles(files, self.images.size, self.images.channels), self.labels[indices]
        )


@dataclass(frozen=True, eq=False)
class Crops(Dataset[tuple[Tensor, Tensor]]):
    """Random crops of the images of a split, cut from the whole image where it is decoded or lies.

    Indexed by B pairs of an index and what its crops are drawn by (see `PlacedOrder`) it gives
    ((B, V, C, s, s) uint8, (B,)), a crop for each of V views.
    """

    split: Split
    size: int
    num_views: int
    min_area: float
    seed: int

    def __len__(self) -> int:
        return len(self.split)

    @property
    def labels(self) -> Tensor:
        """Those of the split."""
        return self.split.labels

    def __getitem__(self, batch: list[tuple[int, tuple[int, int]]]) -> tuple[Tensor, Tensor]:
        # torchvision draws from the global generator, which is left as it was.
        with torch.random.fork_rng(devices=[]):
            crops = [self._cut(self._whole(index), place) for index, place in batch]
        return torch.stack(crops), self.labels[[index for index, _ in batch]]

    def _whole(self, index: int) -> Image.Image | Tensor:
        images = self.split.images
        if isinstance(images, ImageFiles):
            return images.decode(index)
        return images[index] if self.split.originals is None else self.split.originals[index]

    def _cut(self, image: Image.Image | Tensor, place: tuple[int, int]) -> Tensor:
        views = []
        for view in range(self.num_views):
            torch.default_generator.manual_seed(seed_of(self.seed, *place, view))
            box = RandomResizedCrop.get_params(image, [self.min_area, 1.0], [3 / 4, 4 / 3])
            crop = transforms.resized_crop(image, *box, [self.size, self.size], antialias=True)
            views.append(crop if isinstance(crop, Tensor) else transforms.pil_to_tensor(crop))
        return torch.stack(views)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set: its splits and what a network must know about its images.

    Attributes:
        validation: of the training images those that are held out to choose by, if any.
    """

    train: Split
    test: Split
    classes: list[str]
    image_size: int
    channels: int
    mean: list[float]
    std: list[float]
    validation: Split | None = None


class TrainingOrder(Sampler[list[int]]):
    """The batches of indices of one epoch, shuffled by (seed, epoch), from any step on.

    Args:
        batch_size: of all processes together, a multiple of `world_size`.
        rank, world_size: take every world_size-th index of a batch, from the rank-th on: what the
            processes see in a step is together what one process alone would see.
    """

    def __init__(
        self, num_images: int, batch_size: int, seed: int, *, rank: int = 0, world_size: int = 1
    ) -> None:
        assert batch_size % world_size == 0
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.begin(epoch=0)

    def begin(self, epoch: int, step: int = 0) -> None:
        """Choose the epoch, and the step in it, that the next iteration starts with."""
        self.epoch = epoch
        self.step = step

    def __len__(self) -> int:
        """Steps of a whole epoch; images that do not fill a last batch wait for another epoch."""
        return self.num_images // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        for batch in islice(self._epoch(generator), self.step, len(self)):
            yield batch[self.rank :: self.world_size]

    def _epoch(self, generator: torch.Generator) -> Iterator[list[int]]:
        for batch in torch.randperm(self.num_images, generator=generator).split(self.batch_size):
            yield batch.tolist()


class BalancedOrder(TrainingOrder):
    """Batches of some classes with as many images of each, whatever the classes' sizes.

    In an epoch a class comes again when every class came, and an image when every one of its class
    did. A class of fewer images than a batch takes of it repeats them there, in other views.

    Args:
        labels: (N,), of which at least `classes_per_batch` differ.
        batch_size: a multiple of classes_per_batch.
    """

    def __init__(
        self,
        labels: Tensor,
        batch_size: int,
        seed: int,
        *,
        classes_per_batch: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(len(labels), batch_size, seed, rank=rank, world_size=world_size)
        self.classes_per_batch = classes_per_batch
        self.members = [(labels == label).nonzero().flatten() for label in labels.unique()]

    def _epoch(self, generator: torch.Generator) -> Iterator[list[int]]:
        classes = _Deck(torch.arange(len(self.members)), generator)
        images = [_Deck(members, generator) for members in self.members]
        num_each = self.batch_size // self.classes_per_batch
        while True:
            hand = classes.draw(self.classes_per_batch)
            yield [index for label in hand for index in images[label].draw(num_each)]


class PlacedOrder(Sampler[list[tuple[int, tuple[int, int]]]]):
    """The batches of an order, each index with its place: (epoch, number in the whole epoch).

    The place is the same for any number of processes, and an image that comes twice has two.
    """

    def __init__(self, order: TrainingOrder) -> None:
        self.order = order

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[tuple[int, tuple[int, int]]]]:
        order = self.order
        epoch = order.epoch
        for step, indices in enumerate(order, start=order.step):
            first = step * order.batch_size + order.rank
            yield [
                (index, (epoch, first + number * order.world_size))
                for number, index in enumerate(indices)
            ]


class _Deck:
    """Numbers drawn in random order without end, each as often as any other up to one time."""

    def __init__(self, cards: Tensor, generator: torch.Generator) -> None:
        self.cards = cards
        self.generator = generator
        self.left: list[int] = []

    def draw(self, count: int) -> list[int]:
        hand, self.left = self.left[:count], self.left[count:]
        while missing := count - len(hand):
            order = torch.randperm(len(self.cards), generator=self.generator)
            # What is in the hand already goes below: nothing comes twice that need not.
            fresh = sorted(self.cards[order].tolist(), key=set(hand).__contains__)
            hand, self.left = hand + fresh[:missing], fresh[missing:]
        return hand


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
