"""Images in memory or in files, their splits, and random crops of them.

A crop is a pure function of (seed, epoch, place in the order, view), whatever the number of workers.
"""

import hashlib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as transforms

from data.files import File, in_arrays
from run.errors import UserError
from run.seeds import seed_of


class ImageFiles:
    """Images decoded when asked for: shorter side to `size`, centre square, RGB or grey.

    Args:
        files: paths, or files within shards.
    """

    def __init__(self, files: Sequence[File], size: int, channels: int = 3) -> None:
        self.files = in_arrays(files)
        self.size = size
        self.channels = channels

    def __len__(self) -> int:
        return len(self.files)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, S, S), of every image."""
        return (self.channels, self.size, self.size)

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
        square: Tensor = transforms.pil_to_tensor(transforms.center_crop(image, [self.size]))
        return square


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
    def in_memory(self) -> bool:
        """Whether an image is found sooner than sent from another process."""
        return isinstance(self.images, Tensor)

    @property
    def image_bytes(self) -> int:
        """The bytes of an image as it is stored."""
        shape = self.images.shape[1:] if isinstance(self.images, Tensor) else self.images.shape
        return math.prod(shape)

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
    in_memory = False

    def __len__(self) -> int:
        return len(self.split)

    @property
    def labels(self) -> Tensor:
        """Those of the split."""
        return self.split.labels

    @property
    def image_bytes(self) -> int:
        """The bytes of all crops of an image."""
        images = self.split.images
        channels = images.shape[1] if isinstance(images, Tensor) else images.channels
        return self.num_views * channels * self.size**2

    def __getitem__(self, batch: list[tuple[int, tuple[int, int]]]) -> tuple[Tensor, Tensor]:
        # torchvision draws from the global generator, which is left as it was.
        with torch.random.fork_rng(devices=[]):
            crops = [self._cut(self._whole(index), place) for index, place in batch]
        return torch.stack(crops), self.labels[[index for index, _ in batch]]

    def _whole(self, index: int) -> Tensor:
        images = self.split.images
        if isinstance(images, ImageFiles):
            # Cut and resized as a tensor, which takes a third of Pillow's time.
            whole: Tensor = transforms.pil_to_tensor(images.decode(index))
            return whole
        return images[index] if self.split.originals is None else self.split.originals[index]

    def _cut(self, image: Tensor, place: tuple[int, int]) -> Tensor:
        views = []
        for view in range(self.num_views):
            torch.default_generator.manual_seed(seed_of(self.seed, *place, view))
            box = RandomResizedCrop.get_params(image, [self.min_area, 1.0], [3 / 4, 4 / 3])
            views.append(
                transforms.resized_crop(image, *box, [self.size, self.size], antialias=True)
            )
        return torch.stack(views)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set: its splits and what a network must know about its images.

    Attributes:
        validation: of the training images those that are held out to choose by, if any.
        name: as --dataset has it.
    """

    train: Split
    test: Split
    classes: list[str]
    image_size: int
    channels: int
    mean: list[float]
    std: list[float]
    validation: Split | None = None
    name: str = ""
