"""AutoAugment and RandAugment, with the operations, the levels and the draws of the SupCon authors.

Their code calls AutoAugment().distort and RandAugment().distort of TensorFlow's models repository
(official/vision/image_classification/augment.py). A level goes from 0 to 10. Lengths there are in
pixels of 224; here they are shares of the side.

What changes which image is drawn on the CPU, sorted by change and copied to the device once. There
each change is applied to one contiguous slice of the images, with a strength for each.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from math import cos, radians, sin

import torch
import torch.nn.functional as F
from kornia.augmentation.auto.autoaugment.autoaugment import cifar10_policy
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from data.prefetch import on_device

# (B, 3, s, s) images in [0, 1] and the (B, NUM_VALUES) numbers of their changes, to changed images.
Change = Callable[[Tensor, Tensor], Tensor]
# Names, probabilities and levels, one after another.
SubPolicy = Sequence[tuple[str, float, float | None]]

MAX_LEVEL = 10.0
GREY = 128 / 255  # what comes in from outside the image
SHEAR, ROTATION = 0.3, 30.0
# Of the side at level 10. Their AutoAugment moves by 250 pixels, the whole image and more.
AUTOAUGMENT_SHIFT, RANDAUGMENT_SHIFT = 0.5, 100 / 224
CUTOUT = 2 * 40 / 224
NUM_CHANGES = 2
# What a change is told of an image: up to the two rows of an affine transform.
NUM_VALUES = 6


def _moved(images: Tensor, values: Tensor) -> Tensor:
    grid = F.affine_grid(values.view(-1, 2, 3), list(images.shape), align_corners=False)
    # Zeros come in from outside, where grey is to.
    return F.grid_sample(images - GREY, grid, mode="nearest", align_corners=False) + GREY


def _posterized(images: Tensor, values: Tensor) -> Tensor:
    num_levels = _factors(values)
    return torch.minimum((images * num_levels).floor(), num_levels - 1) / num_levels


def _solarized(images: Tensor, values: Tensor) -> Tensor:
    return torch.where(images < _factors(values), images, 1 - images)


def _solarized_by_adding(images: Tensor, values: Tensor) -> Tensor:
    return torch.where(images < 128 / 255, (images + _factors(values)).clamp(max=1.0), images)


def _cut_out(images: Tensor, values: Tensor) -> Tensor:
    half, *centres = values[:, :3, None].unbind(1)
    places = torch.arange(images.shape[-1], device=images.device)
    rows, columns = ((places - centre + 0.5).abs() < half for centre in centres)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], GREY)


def _sharpened(images: Tensor, values: Tensor) -> Tensor:
    kernel = images.new_full((3, 1, 3, 3), 1 / 13)
    kernel[:, :, 1, 1] = 5 / 13
    blurred = images.clone()
    blurred[..., 1:-1, 1:-1] = F.conv2d(images, kernel, groups=3)
    return _blended(blurred, images, values)


def _contrasted(images: Tensor, values: Tensor) -> Tensor:
    grey = transforms.rgb_to_grayscale(images).mean((1, 2, 3), keepdim=True)
    return _blended(grey, images, values)


def _blended(dull: Tensor, images: Tensor, values: Tensor) -> Tensor:
    return torch.lerp(dull, images, _factors(values)).clamp(0, 1)


def _factors(values: Tensor) -> Tensor:
    return values[:, :1, None, None]


CHANGES: dict[str, Change] = {
    "auto_contrast": lambda images, values: transforms.autocontrast(images),
    "equalize": lambda images, values: transforms.equalize(images),
    "invert": lambda images, values: 1 - images,
    "move": _moved,
    "posterize": _posterized,
    "solarize": _solarized,
    "solarize_add": _solarized_by_adding,
    "color": lambda images, values: _blended(transforms.rgb_to_grayscale(images), images, values),
    "contrast": _contrasted,
    "brightness": lambda images, values: (images * _factors(values)).clamp(0, 1),
    "sharpness": _sharpened,
    "cutout": _cut_out,
    "none": lambda images, values: images,
}
KINDS = list(CHANGES)
MOVES = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}
# To either side, one as often as the other.
SIGNED = MOVES
RANDAUGMENT = (
    "auto_contrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "color",
    "contrast", "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y",
    "cutout", "none",
)  # fmt: skip


def _move(name: str, share: float, size: int, most: float) -> list[float]:
    """Where a pixel comes from, in coordinates from -1 to 1 over the side."""
    turn, shear = radians(ROTATION * share), SHEAR * share
    shift = -round(most * share * size) / (size / 2)
    return {
        "rotate": [cos(turn), sin(turn), 0.0, -sin(turn), cos(turn), 0.0],
        "shear_x": [1.0, shear, shear, 0.0, 1.0, 0.0],
        "shear_y": [1.0, 0.0, 0.0, shear, 1.0, shear],
        "translate_x": [1.0, 0.0, shift, 0.0, 1.0, 0.0],
        "translate_y": [1.0, 0.0, 0.0, 0.0, 1.0, shift],
    }[name]


def _strength(name: str, share: float, size: int) -> float:
    """The first number that a change other than a move is told."""
    strengths = {
        "posterize": float(2 ** int(share * 4)),
        "solarize": int(share * 256) / 255,  # at level 10 it leaves everything alone
        "solarize_add": int(share * 110) / 255,
        "cutout": share * CUTOUT * size / 2,
    }
    return strengths.get(name, 1.8 * share + 0.1)


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


class Policy(nn.Module):
    """Changes each image of (B, 3, s, s) in [0, 1] by what is drawn for it alone.

    Args:
        stages: in turn, the choices of which an image gets one, whose changes it goes through.
        shift: of the side, by which a translation moves at level 10.
    """

    def __init__(self, stages: Sequence[Sequence[SubPolicy]], *, shift: float) -> None:
        super().__init__()
        self.stages = stages
        self.shift = shift
        # By the side of the images, for each stage.
        self.tables: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def forward(self, images: Tensor) -> Tensor:
        count, size = len(images), images.shape[-1]
        kinds, values = self.draw(count, size)
        # Image numbers in the order of their change, of each round; then in their own.
        orders = [*kinds.argsort(stable=True), torch.arange(count)]
        # Of each order, where its images lie in the one before.
        places = [before.argsort()[order] for before, order in zip([orders[-1], *orders], orders)]
        values = torch.stack([of_all[order] for of_all, order in zip(values, orders)])
        # One copy: float32 holds the number of any image exactly.
        drawn = torch.cat([torch.stack(places).float().flatten(), values.flatten()])
        drawn = on_device(drawn, images.device)
        source_of_all, told_of_all = drawn.split([len(orders) * count, values.numel()])
        sources = source_of_all.long().view(len(orders), count)
        rounds = zip(kinds.sort().values.tolist(), sources, told_of_all.view_as(values))
        for of_round, source, told in rounds:
            groups = [(kind, len(list(group))) for kind, group in groupby(of_round)]
            sizes = [number for _, number in groups]
            parts = zip(groups, images[source].split(sizes), told.split(sizes))
            images = torch.cat([CHANGES[KINDS[kind]](*part) for (kind, _), *part in parts])
        return images[sources[-1]]

    def draw(self, count: int, size: int) -> tuple[Tensor, Tensor]:
        """For each round of changes and each image the number of its kind, and what it is told.

        Returns:
            (R, count) places in KINDS and (R, count, NUM_VALUES).
        """
        if size not in self.tables:
            self.tables[size] = [self._table(stage, size) for stage in self.stages]
        drawn = []
        for kinds, probabilities, values in self.tables[size]:
            choice = torch.randint(len(kinds), (count,))
            for number in range(kinds.shape[1]):
                happens = torch.rand(count) < probabilities[choice, number]
                side = torch.randint(2, (count,))
                kind = torch.where(happens, kinds[choice, number], KINDS.index("none"))
                told = values[choice, number, side]
                centres = torch.randint(size, (count, 2)).float()
                is_cutout = (kind == KINDS.index("cutout"))[:, None]
                told[:, 1:3] = torch.where(is_cutout, centres, told[:, 1:3])
                drawn.append((kind, told))
        of_kinds, of_values = zip(*drawn)
        return torch.stack(of_kinds), torch.stack(of_values)

    def _table(self, stage: Sequence[SubPolicy], size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of each choice and each of its changes: the kind, the probability, the values by side."""
        kinds = [[self.kind_of(name) for name, *_ in choice] for choice in stage]
        probabilities = [[probability for _, probability, _ in choice] for choice in stage]
        values = [
            [[self._values(*change, side, size) for side in (1, -1)] for change in choice]
            for choice in stage
        ]
        return torch.tensor(kinds), torch.tensor(probabilities), torch.tensor(values)

    @staticmethod
    def kind_of(name: str) -> int:
        """The place in KINDS of what makes a change of that name."""
        return KINDS.index("move" if name in MOVES else name)

    def _values(
        self, name: str, probability: float, level: float | None, side: int, size: int
    ) -> list[float]:
        share = (level or 0.0) / MAX_LEVEL * (side if name in SIGNED else 1)
        if name in MOVES:
            return _move(name, share, size, self.shift)
        return [_strength(name, share, size)] + [0.0] * (NUM_VALUES - 1)


def autoaugment(*, cifar: bool) -> Policy:
    """AutoAugment (Cubuk et al., arXiv 1805.09501): two changes in turn, drawn for each image."""
    return Policy([cifar10_policy if cifar else IMAGENET_POLICY], shift=AUTOAUGMENT_SHIFT)


def randaugment() -> Policy:
    """RandAugment (Cubuk et al., arXiv 1909.13719) at level 10: two changes, or none in their place."""
    stage = [[(name, 1.0, MAX_LEVEL)] for name in RANDAUGMENT]
    return Policy([stage] * NUM_CHANGES, shift=RANDAUGMENT_SHIFT)
