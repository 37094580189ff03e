"""What the network sees of an image: random views in training, the plain centre in evaluation.

A view is a pure function of (seed, step, view): kornia draws the parameters of a whole
batch under a seed of its own, and the global random state is left as it was.
"""

from collections.abc import Sequence

import kornia.augmentation as K
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from config import PretrainConfig
from data import ImageData
from seeds import seed_of


class Views:
    """Makes network inputs from stored images: (B, C, S, S) uint8 to (B, C, s, s) float."""

    def __init__(
        self,
        pipeline: nn.Module,
        *,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        memory_format: torch.memory_format = torch.channels_last,
    ) -> None:
        self.pipeline = pipeline
        self.image_size = image_size
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)
        self.seed = seed
        self.memory_format = memory_format

    @torch.no_grad()
    def random(self, images: Tensor, *, step: int, view: int) -> Tensor:
        """One random view of each image; `step` counts from the start of the run."""
        cuda = [images.device] if images.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seed_of(self.seed, step, view))
            return self._normalize(self.pipeline(images.float() / 255))

    @torch.no_grad()
    def plain(self, images: Tensor) -> Tensor:
        """The centre of each image."""
        images = transforms.center_crop(images, [self.image_size, self.image_size])
        return self._normalize(images.float() / 255)

    def _normalize(self, images: Tensor) -> Tensor:
        images = (images - self.mean.to(images.device)) / self.std.to(images.device)
        return images.contiguous(memory_format=self.memory_format)


def build_views(config: PretrainConfig, data: ImageData) -> Views:
    """The views that a config asks for."""
    if config.augment == "digits" or (config.augment == "auto" and config.dataset == "digits"):
        pipeline = _digits(data.image_size)
    else:
        pipeline = _simclr(data.image_size, data.channels)
    return Views(
        pipeline,
        image_size=data.image_size,
        mean=data.mean,
        std=data.std,
        seed=config.seed,
        memory_format=config.memory_format,
    )


def _digits(size: int) -> nn.Module:
    """Slant, turn, shift and scale as handwriting does; a flip would make another digit."""
    return nn.Sequential(
        K.CenterCrop((size, size)),
        K.RandomAffine(
            degrees=15.0,
            translate=(0.1, 0.1),
            scale=(0.8, 1.2),
            shear=torch.tensor([-10.0, 10.0, -10.0, 10.0]),
            p=1.0,
        ),
    )


def _simclr(size: int, channels: int) -> nn.Module:
    """Crop, flip and change of colour with the strengths of the SupContrast repository.

    Grey images get the part of the colour change that grey can show.
    """
    shape = [
        K.RandomResizedCrop((size, size), scale=(0.2, 1.0), p=1.0),
        K.RandomHorizontalFlip(p=0.5),
    ]
    if channels == 3:
        colour = [K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), K.RandomGrayscale(p=0.2)]
    else:
        colour = [K.RandomBrightness((0.6, 1.4), p=0.8), K.RandomContrast((0.6, 1.4), p=0.8)]
    return nn.Sequential(*shape, *colour)
