"""AutoAugment and RandAugment, with the operations, the levels and the draws of the SupCon authors.

Their code calls AutoAugment().distort and RandAugment().distort of TensorFlow's models repository
(official/vision/image_classification/augment.py). A level goes from 0 to 10. Lengths there are in
pixels of 224; here they are shares of the side.
"""

import math
from collections.abc import Callable, Sequence

import torch
from kornia.augmentation.auto.autoaugment.autoaugment import cifar10_policy
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

# (B, 3, s, s) images in [0, 1] and the level's share of the strongest, to changed images.
Change = Callable[[Tensor, float], Tensor]
# Names, probabilities and levels, one after another.
SubPolicy = Sequence[tuple[str, float, float | None]]

MAX_LEVEL = 10.0
GREY = 128 / 255  # what comes in from outside the image
SHEAR, ROTATION = 0.3, 30.0
# Of the side at level 10. Their AutoAugment moves by 250 pixels, the whole image and more.
AUTOAUGMENT_SHIFT, RANDAUGMENT_SHIFT = 0.5, 100 / 224
CUTOUT = 2 * 40 / 224
NUM_CHANGES = 2


def _moved(images: Tensor, **options: object) -> Tensor:
    still = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    moved: Tensor = transforms.affine(images, **(still | options), fill=[GREY] * 3)
    return moved


def _shear_x(images: Tensor, share: float) -> Tensor:
    return _moved(images, shear=[math.degrees(math.atan(SHEAR * share)), 0.0], center=[0, 0])


def _shear_y(images: Tensor, share: float) -> Tensor:
    return _moved(images, shear=[0.0, math.degrees(math.atan(SHEAR * share))], center=[0, 0])


def _shift(axis: int, most: float) -> Change:
    def change(images: Tensor, share: float) -> Tensor:
        pixels = [0, 0]
        pixels[axis] = round(most * share * images.shape[-1])
        return _moved(images, translate=pixels)

    return change


def _solarize(images: Tensor, share: float) -> Tensor:
    # At level 10 it leaves everything alone.
    return torch.where(images < int(share * 256) / 255, images, 1 - images)


def _solarize_add(images: Tensor, share: float) -> Tensor:
    brighter = (images + int(share * 110) / 255).clamp(max=1.0)
    return torch.where(images < 128 / 255, brighter, images)


def _cutout(images: Tensor, share: float) -> Tensor:
    size = images.shape[-1]
    half = share * CUTOUT * size / 2
    centres = torch.randint(size, (2, len(images))).to(images.device)
    near = (torch.arange(size, device=images.device) - centres[..., None] + 0.5).abs() < half
    inside = near[0, :, :, None] & near[1, :, None, :]
    return images.masked_fill(inside[:, None], GREY)


def _enhanced(function: Callable[[Tensor, float], Tensor]) -> Change:
    return lambda images, share: function(images, 1.8 * share + 0.1)


CHANGES: dict[str, Change] = {
    "auto_contrast": lambda images, share: transforms.autocontrast(images),
    "equalize": lambda images, share: transforms.equalize(images),
    "invert": lambda images, share: transforms.invert(images),
    "rotate": lambda images, share: _moved(images, angle=ROTATION * share),
    "posterize": lambda images, share: transforms.posterize(images, int(share * 4)),
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _enhanced(transforms.adjust_saturation),
    "contrast": _enhanced(transforms.adjust_contrast),
    "brightness": _enhanced(transforms.adjust_brightness),
    "sharpness": _enhanced(transforms.adjust_sharpness),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _shift(0, AUTOAUGMENT_SHIFT),
    "translate_y": _shift(1, AUTOAUGMENT_SHIFT),
    "cutout": _cutout,
}
# To either side, one as often as the other.
SIGNED = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}

# Which is not the policy of the AutoAugment paper.
IMAGENET_POLICY: list[SubPolicy] = [
    [("equalize", 0.8, 1), ("shear_y", 0.8, 4)],
    [("color", 0.4, 9), ("equalize", 0.6, 3)],
    [("color", 0.4, 1), ("rotate", 0.6, 8)],
    [("solarize", 0.8, 3), ("equalize", 0.4, 7)],
    [("solarize", 0.4, 2), ("solarize", 0.6, 2)],
    [("color", 0.2, 0), ("equalize", 0.8, 8)],
    [("equalize", 0.4, 8), ("solarize_add", 0.8, 3)],
    [("shear_x", 0.2, 9), ("rotate", 0.6, 8)],
    [("color", 0.6, 1), ("equalize", 1.0, 2)],
    [("invert", 0.4, 9), ("rotate", 0.6, 0)],
    [("equalize", 1.0, 9), ("shear_y", 0.6, 3)],
    [("color", 0.4, 7), ("equalize", 0.6, 0)],
    [("posterize", 0.4, 6), ("auto_contrast", 0.4, 7)],
    [("solarize", 0.6, 8), ("color", 0.6, 9)],
    [("solarize", 0.2, 4), ("rotate", 0.8, 9)],
    [("rotate", 1.0, 7), ("translate_y", 0.8, 9)],
    [("shear_x", 0.0, 0), ("solarize", 0.8, 4)],
    [("shear_y", 0.8, 0), ("color", 0.6, 4)],
    [("color", 1.0, 0), ("rotate", 0.6, 2)],
    [("equalize", 0.8, 4), ("equalize", 0.0, 8)],
    [("equalize", 1.0, 4), ("auto_contrast", 0.6, 2)],
    [("shear_y", 0.4, 7), ("solarize_add", 0.6, 7)],
    [("posterize", 0.8, 2), ("solarize", 0.6, 10)],
    [("solarize", 0.6, 8), ("equalize", 0.6, 1)],
    [("color", 0.8, 6), ("rotate", 0.4, 5)],
]


class Operation(nn.Module):
    """One change, of each image of (B, 3, s, s) with a probability, to a random side."""

    def __init__(self, change: Change, *, probability: float, level: float, signed: bool) -> None:
        super().__init__()
        self.change = change
        self.probability = probability
        self.share = level / MAX_LEVEL
        self.signs = (1.0, -1.0) if signed else (1.0,)

    def forward(self, images: Tensor) -> Tensor:
        happens = torch.rand(len(images)) < self.probability
        side = torch.randint(len(self.signs), (len(images),))
        changed = images.clone()
        for number, sign in enumerate(self.signs):
            chosen = (happens & (side == number)).nonzero().flatten().to(images.device)
            if len(chosen) > 0:
                changed[chosen] = self.change(images[chosen], sign * self.share)
        return changed


class EachImage(nn.Module):
    """Applies to every image of (B, 3, s, s) one of some changes, drawn for it alone."""

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


def autoaugment(*, cifar: bool) -> nn.Module:
    """AutoAugment (Cubuk et al., arXiv 1805.09501): two changes in turn, drawn for each image."""
    policy: Sequence[SubPolicy] = cifar10_policy if cifar else IMAGENET_POLICY
    return EachImage(
        [
            nn.Sequential(
                *(
                    Operation(
                        CHANGES[name], probability=p, level=level or 0.0, signed=name in SIGNED
                    )
                    for name, p, level in pair
                )
            )
            for pair in policy
        ]
    )


def randaugment() -> list[nn.Module]:
    """RandAugment (Cubuk et al., arXiv 1909.13719) at level 10: two changes, or none in their place."""
    changes = CHANGES | {
        "translate_x": _shift(0, RANDAUGMENT_SHIFT),
        "translate_y": _shift(1, RANDAUGMENT_SHIFT),
    }
    operations = [
        Operation(change, probability=1.0, level=MAX_LEVEL, signed=name in SIGNED)
        for name, change in changes.items()
    ]
    return [EachImage([*operations, nn.Identity()]) for _ in range(NUM_CHANGES)]
