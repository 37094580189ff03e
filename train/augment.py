"""What the network sees of an image: random views in training, the plain centre in evaluation.

A view is a pure function of (seed, step, view), and of the process of several: kornia draws the parameters of a whole
batch under a seed of its own, and the global random state is left as it was.
"""

from collections.abc import Sequence

import kornia.augmentation as K
import torch
from kornia.augmentation.auto import AutoAugment, RandAugment
from kornia.augmentation.auto.autoaugment.autoaugment import cifar10_policy, imagenet_policy
from kornia.augmentation.auto.base import SUBPOLICY_CONFIG
from kornia.augmentation.auto.rand_augment.rand_augment import default_policy
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from config import PretrainConfig, UserError
from data import ImageData
from ranks import ALONE, Ranks
from seeds import seed_of

# Each holds a change that needs three channels.
POLICIES = ("autoaugment", "randaugment", "stacked_randaugment")
CIFAR = ("cifar10", "cifar100")
# Of RandAugment: changes in a row, and their strength of 30.
NUM_CHANGES, MAGNITUDE = 2, 9


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
        seed_key: tuple[int, ...] = (),
        memory_format: torch.memory_format = torch.channels_last,
    ) -> None:
        self.pipeline = pipeline
        self.image_size = image_size
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)
        self.seed = seed
        self.seed_key = seed_key
        self.memory_format = memory_format

    @torch.no_grad()
    def random(self, images: Tensor, *, step: int, view: int) -> Tensor:
        """One random view of each image; `step` counts from the start of the run."""
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
        images = (images - self.mean.to(images.device)) / self.std.to(images.device)
        return images.contiguous(memory_format=self.memory_format)


def build_views(config: PretrainConfig, data: ImageData, ranks: Ranks = ALONE) -> Views:
    """The views that a config asks for.

    Raises:
        UserError: the images are grey and the augmentation changes colours.
    """
    name = config.augment
    if name == "auto":
        name = "digits" if config.dataset == "digits" else "simclr"
    if name in POLICIES and data.channels != 3:
        raise UserError(
            f"--augment {name} changes colours, and the images of {config.dataset} are grey: "
            "--augment simclr takes both"
        )
    return Views(
        _pipeline(name, config.dataset, data),
        image_size=data.image_size,
        mean=data.mean,
        std=data.std,
        seed=config.seed,
        seed_key=ranks.seed_key,
        memory_format=config.memory_format,
    )


class EachImage(nn.Module):
    """Applies to every image of (B, C, s, s) one of some changes, drawn for it alone.

    kornia's own policies draw one change for a whole batch.
    """

    def __init__(self, changes: Sequence[nn.Module]) -> None:
        super().__init__()
        self.changes = nn.ModuleList(changes)

    def forward(self, images: Tensor) -> Tensor:
        drawn = torch.randint(len(self.changes), (len(images),))
        changed = torch.empty_like(images)
        for number, change in enumerate(self.changes):
            chosen = (drawn == number).nonzero().flatten().to(images.device)
            if len(chosen) > 0:
                changed[chosen] = change(images[chosen])
        return changed


def _pipeline(name: str, dataset: str, data: ImageData) -> nn.Module:
    size, channels = data.image_size, data.channels
    if name == "digits":
        return _digits(size)
    parts = [
        # "resample" cuts the whole batch at once; "slice" would go from image to image.
        K.RandomResizedCrop((size, size), scale=(0.2, 1.0), p=1.0, cropping_mode="resample"),
        K.RandomHorizontalFlip(p=0.5),
    ]
    if name == "autoaugment":
        parts += [_autoaugment(cifar10_policy if dataset in CIFAR else imagenet_policy)]
    elif name == "randaugment":
        parts += _randaugment()
    elif name == "stacked_randaugment":
        jitter, grey = _colours(channels)
        parts += [jitter, *_randaugment(), grey]
    elif name != "crop_flip":
        parts += _colours(channels)
    if name == "simclr_blur":
        # A tenth of the side, as SimCLR has it, rounded to an odd number.
        kernel = max(3, size // 10 // 2 * 2 + 1)
        parts += [K.RandomGaussianBlur((kernel, kernel), sigma=(0.1, 2.0), p=0.5)]
    return nn.Sequential(*parts)


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


def _colours(channels: int) -> list[nn.Module]:
    """The change of colour with the strengths of the SupContrast repository.

    Grey images get the part of it that grey can show.
    """
    if channels == 3:
        return [K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), K.RandomGrayscale(p=0.2)]
    return [K.RandomBrightness((0.6, 1.4), p=0.8), K.RandomContrast((0.6, 1.4), p=0.8)]


def _autoaugment(policy: list[SUBPOLICY_CONFIG]) -> nn.Module:
    """AutoAugment (Cubuk et al., arXiv 1805.09501): one pair of changes for each image."""
    return EachImage([AutoAugment([pair]) for pair in policy])


def _randaugment() -> list[nn.Module]:
    """RandAugment (Cubuk et al., arXiv 1909.13719): so many changes for each image in turn."""
    changes = [RandAugment(n=1, m=MAGNITUDE, policy=[change]) for change in default_policy]
    return [EachImage(changes) for _ in range(NUM_CHANGES)]
