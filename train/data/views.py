"""What the network sees of an image: random views in training, the plain centre in evaluation.

A view is a pure function of (seed, step, view), and of the process of several: kornia draws the
parameters of a whole batch under a seed of its own, and the global random state is left as it was.
Of images in files it begins with a crop that was cut where the image was decoded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import kornia.augmentation as K
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from data.images import Crops, ImageData, ImageFiles, Split
from data.policies import autoaugment, randaugment
from data.prefetch import on_device
from run.errors import UserError
from run.processes import ALONE, Ranks
from run.rules import broken, out_of_range
from run.seeds import seed_of

# Each holds a change that needs three channels.
POLICIES = ("autoaugment", "randaugment", "stacked_randaugment")
CIFAR = ("cifar10", "cifar100")
Augment = Literal[
    "auto", "digits", "crop_flip", "simclr", "simclr_blur",
    "autoaugment", "randaugment", "stacked_randaugment",
]  # fmt: skip


@dataclass
class ViewOptions:
    """The random views of each image.

    Args:
        augment: Random changes. auto: digits for the data set digits, otherwise simclr. digits:
            shear, rotation, shift and scale. All others crop and flip. crop_flip: nothing else.
            simclr: also colour jitter. simclr_blur: also colour jitter and blur. autoaugment,
            randaugment: also that policy, drawn per image. stacked_randaugment: randaugment with
            colour jitter of twice the strength and blur.
        min_crop_area: Smallest share of an image that a random crop keeps. The SupCon authors use
            0.08 on ImageNet, SupContrast 0.2. Files are cropped from the whole image, also stl10 if
            image_size is below 96.
        num_views: Random views of each image in a batch. Default: 2; cross_entropy, max_margin: 1.
    """

    augment: Augment = "auto"
    min_crop_area: float = 0.2
    num_views: int | None = None

    def mistakes(self) -> list[str]:
        """What is out of range, one sentence each."""
        rules = [
            (
                0 < self.min_crop_area <= 1,
                f"--min_crop_area {self.min_crop_area}: must be greater than 0 and at most 1",
            )
        ]
        return broken(rules) + out_of_range(
            self, at_least={"num_views": 1}, at_most={"num_views": 1000}
        )

    def changes(self, dataset: str) -> str:
        """What `augment` is for a data set."""
        if self.augment != "auto":
            return self.augment
        return "digits" if dataset == "digits" else "simclr"

    def crops(self, dataset: str) -> bool:
        """Whether views begin with a random crop."""
        return self.changes(dataset) != "digits"


class Views:
    """Makes network inputs from stored images: (B, C, S, S) uint8 to (B, C, s, s) float.

    Args:
        pipeline: the random changes.
        traits: in what these views differ from those of earlier versions, which a checkpoint holds.
    """

    def __init__(
        self,
        pipeline: nn.Module,
        *,
        traits: Sequence[str] = (),
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        seed_key: tuple[int, ...] = (),
        memory_format: torch.memory_format = torch.channels_last,
    ) -> None:
        self.pipeline = pipeline
        self.traits = list(traits)
        self.image_size = image_size
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)
        self.seed = seed
        self.seed_key = seed_key
        self.memory_format = memory_format

    @torch.no_grad()
    def random(self, images: Tensor, *, step: int, view: int) -> Tensor:
        """One random view of each image; `step` counts from the start of the run.

        Args:
            images: (B, C, S, S), or (B, V, C, s, s) that hold a crop for each view.
        """
        if images.ndim == 5:
            images = images[:, view]
        cuda = [images.device] if images.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seed_of(self.seed, step, view, *self.seed_key))
            return self._normalize(self.pipeline(images.float() / 255))

    @torch.no_grad()
    def plain(self, images: Tensor) -> Tensor:
        """The centre of each image."""
        images = transforms.center_crop(images, [self.image_size, self.image_size])
        return self._normalize(images.float() / 255)

    def _normalize(self, images: Tensor) -> Tensor:
        if self.mean.device != images.device:  # once: each copy would wait for the device
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        images = (images - self.mean) / self.std
        return images.contiguous(memory_format=self.memory_format)


def build_views(
    options: ViewOptions,
    data: ImageData,
    *,
    seed: int,
    ranks: Ranks = ALONE,
    memory_format: torch.memory_format = torch.channels_last,
) -> Views:
    """The views that the options ask for.

    Raises:
        UserError: the images are grey and the augmentation changes colours.
    """
    changes = options.changes(data.name)
    if changes in POLICIES and data.channels != 3:
        raise UserError(
            f"--augment {changes} changes colours, and the images of {data.name} are grey: "
            "--augment simclr takes both"
        )
    return Views(
        nn.Sequential(*_begin(options, data), *_changes(changes, data)),
        traits=_traits(options, data),
        image_size=data.image_size,
        mean=data.mean,
        std=data.std,
        seed=seed,
        seed_key=ranks.seed_key,
        memory_format=memory_format,
    )


def training_images(options: ViewOptions, data: ImageData, *, seed: int) -> Split | Crops:
    """What training batches are drawn from: of files and larger originals, crops in every view."""
    if not _are_cut_where_decoded(options, data):
        return data.train
    assert options.num_views is not None  # as options of a run have it
    return Crops(
        data.train,
        size=data.image_size,
        num_views=options.num_views,
        min_area=options.min_crop_area,
        seed=seed,
    )


def _are_cut_where_decoded(options: ViewOptions, data: ImageData) -> bool:
    larger = isinstance(data.train.images, ImageFiles) or data.train.originals is not None
    return options.crops(data.name) and larger


def _traits(options: ViewOptions, data: ImageData) -> list[str]:
    changes = options.changes(data.name)
    found = []
    if _are_cut_where_decoded(options, data):
        in_files = isinstance(data.train.images, ImageFiles)
        found.append("crops of whole images" + ", resized as tensors" * in_files)
    if changes in POLICIES:
        found.append("the authors' policy, drawn at once")
    if changes.startswith("simclr") and data.channels == 1:
        found.append("multiplied brightness and contrast")
    return found


class GreyJitter(nn.Module):
    """Of each image of (B, 1, s, s) brightness and contrast, in either order, with a probability.

    Both are torchvision's: the image times a factor, and away from its mean by one. kornia's changes
    of one channel are others: they add, and multiply about zero.
    """

    def __init__(self, strength: float, *, p: float) -> None:
        super().__init__()
        self.strength = strength
        self.p = p

    def forward(self, images: Tensor) -> Tensor:
        happens = torch.rand(len(images), 1, 1, 1) < self.p
        # Drawn on the CPU: the same factors on every device.
        factors = 1 + self.strength * (2 * torch.rand(2, len(images), 1, 1, 1) - 1)
        contrast_first = torch.rand(len(images), 1, 1, 1)[None] < 0.5
        drawn = torch.cat([torch.where(happens, factors, 1.0), contrast_first])
        brightness, contrast, contrast_first = on_device(drawn, images.device)
        return torch.where(
            contrast_first > 0,
            _brighter(_contrasted(images, contrast), brightness),
            _contrasted(_brighter(images, brightness), contrast),
        )


def _brighter(images: Tensor, factors: Tensor) -> Tensor:
    return (images * factors).clamp(0, 1)


def _contrasted(images: Tensor, factors: Tensor) -> Tensor:
    mean = images.mean((1, 2, 3), keepdim=True)
    return (mean + factors * (images - mean)).clamp(0, 1)


def _begin(options: ViewOptions, data: ImageData) -> list[nn.Module]:
    size = (data.image_size, data.image_size)
    if not options.crops(data.name):
        return [K.CenterCrop(size)]
    flip = K.RandomHorizontalFlip(p=0.5)
    if _are_cut_where_decoded(options, data):
        return [flip]
    # "resample" cuts the whole batch at once; "slice" would go from image to image.
    scale = (options.min_crop_area, 1.0)
    return [K.RandomResizedCrop(size, scale=scale, p=1.0, cropping_mode="resample"), flip]


def _changes(name: str, data: ImageData) -> list[nn.Module]:
    if name == "digits":
        return [_handwriting()]
    if name == "autoaugment":
        return [autoaugment(cifar=data.name in CIFAR)]
    if name == "randaugment":
        return [randaugment()]
    if name == "stacked_randaugment":
        jitter, grey = _colours(data.channels, strength=1.0)
        return [jitter, randaugment(), grey, _blur(data.image_size)]
    if name == "crop_flip":
        return []
    colours = _colours(data.channels)
    return [*colours, _blur(data.image_size)] if name == "simclr_blur" else colours


def _handwriting() -> nn.Module:
    """Slant, turn, shift and scale as handwriting does; a flip would make another digit."""
    change: nn.Module = K.RandomAffine(
        degrees=15.0,
        translate=(0.1, 0.1),
        scale=(0.8, 1.2),
        shear=torch.tensor([-10.0, 10.0, -10.0, 10.0]),
        p=1.0,
    )
    return change


def _colours(channels: int, *, strength: float = 0.5) -> list[nn.Module]:
    """SimCLR's change of colours; with a strength of 0.5 that of the SupContrast repository.

    Grey images get the part of it that grey can show.
    """
    jitter = 0.8 * strength
    if channels == 3:
        return [
            K.ColorJitter(jitter, jitter, jitter, 0.2 * strength, p=0.8),
            K.RandomGrayscale(p=0.2),
        ]
    return [GreyJitter(jitter, p=0.8)]


def _blur(size: int) -> nn.Module:
    # A tenth of the side, as SimCLR has it, rounded to an odd number.
    kernel = max(3, size // 10 // 2 * 2 + 1)
    blur: nn.Module = K.RandomGaussianBlur((kernel, kernel), sigma=(0.1, 2.0), p=0.5)
    return blur
