"""The table of cases: what a backend is given, and why. Tests take it whole; none makes its own inputs.

A case builds the arguments of ``supcon_loss`` in float64; the comparison rounds the features to
the dtype under test and gives everything else as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from supcon_kernels import available_backends, supcon_loss

Arguments = dict[str, Any]
VARIANTS = [
    (summation, denominator)
    for summation in ("out", "in")
    for denominator in ("all", "one_positive", "only_negatives")
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NOWHERE = -100
BACKENDS = [name for name, why_not in available_backends().items() if why_not is None]
FUSED = [name for name in BACKENDS if name != "reference"]


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments under a name, and the reason that they are in the table."""

    id: str
    why: str
    build: Callable[[torch.Generator], Arguments]

    def arguments(self) -> Arguments:
        """The same arguments at every call."""
        return {"temperature": 0.1, **self.build(torch.Generator().manual_seed(2004))}


CASES: list[Case] = []


def case(why: str) -> Callable[[Callable[[torch.Generator], Arguments]], None]:
    """Enter the function's arguments in the table under the function's name."""

    def enter(build: Callable[[torch.Generator], Arguments]) -> None:
        CASES.append(Case(build.__name__, why, build))

    return enter


def by_id(name: str) -> Case:
    """The case of that name."""
    return next(c for c in CASES if c.id == name)


def parametrize() -> pytest.MarkDecorator:
    """Run a test on every case of the table."""
    return pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)


def takes(backend: str, arguments: Arguments) -> bool:
    """Whether a backend takes a call at all: what it refuses is no case for it."""
    try:
        supcon_loss(**arguments, backend=backend)
    except ValueError as refusal:
        if f"backend {backend!r} cannot take this call" in str(refusal):
            return False
        raise
    return True


def randn(g: torch.Generator, *shape: int) -> Tensor:
    """Standard normal float64."""
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def classes(g: torch.Generator, n: int, num_classes: int) -> Tensor:
    """(n,) integer labels."""
    return torch.randint(num_classes, (n,), generator=g)


# --- shapes


@case("every size a multiple of every tile")
def aligned(g):
    return {"features": randn(g, 128, 64), "labels": classes(g, 128, 8)}


@case("no size a multiple of anything")
def ragged(g):
    return {"features": randn(g, 127, 123), "labels": classes(g, 127, 7)}


@case("more rows than one chunk or tile takes, and more than one row of tiles")
def several_tiles(g):
    return {"features": randn(g, 1031, 24), "labels": classes(g, 1031, 10)}


@case("a single row has nothing to contrast with")
def single_row(g):
    return {"features": randn(g, 1, 5), "labels": torch.tensor([3])}


@case("a final batch may be empty")
def empty(g):
    return {"features": randn(g, 0, 5), "labels": classes(g, 0, 2)}


@case("an empty batch of views")
def empty_views(g):
    return {"features": randn(g, 0, 2, 5)}


@case("one feature: normalised rows are +1 and -1")
def one_feature(g):
    return {"features": randn(g, 33, 1), "labels": classes(g, 33, 3)}


@case("fewer features than any vector register holds")
def three_features(g):
    return {"features": randn(g, 50, 3), "labels": classes(g, 50, 4)}


@case("no feature at all: every similarity is 0")
def no_features(g):
    return {"features": randn(g, 10, 0), "labels": classes(g, 10, 2)}


@case("wide rows")
def wide(g):
    return {"features": randn(g, 40, 515), "labels": classes(g, 40, 4)}


@case("an anchor without positives whose row is too short for its square")
def tiny_idle_row(g):
    features, memory = randn(g, 6, 3), randn(g, 8, 3)
    features[2] = torch.tensor([1e-30, 0.0, 0.0])
    return {
        "features": features,
        "labels": torch.tensor([0, 1, 9, 0, 1, 1]),
        "contrast_features": memory,
        "contrast_labels": torch.tensor([0, 1, 0, 1, 0, 1, 2, 2]),
    }


# --- views


@case("one view of each sample, in the shape with views")
def one_view(g):
    return {"features": randn(g, 40, 1, 16), "labels": classes(g, 40, 4)}


@case("the usual call: two views and labels")
def two_views(g):
    return {"features": randn(g, 48, 2, 32), "labels": classes(g, 48, 6)}


@case("no labels: SimCLR, with more than one positive")
def unlabelled_views(g):
    return {"features": randn(g, 21, 3, 16)}


@case("only first views are anchors")
def first_view_anchors(g):
    args = {"features": randn(g, 30, 2, 16), "labels": classes(g, 30, 5)}
    return {**args, "contrast_mode": "one", "base_temperature": 0.07}


# --- labels


@case("everything is positive: no anchor has a negative")
def one_class(g):
    return {"features": randn(g, 37, 16), "labels": torch.zeros(37, dtype=torch.int64)}


@case("nothing is positive: no anchor contributes")
def all_distinct(g):
    return {"features": randn(g, 37, 16), "labels": torch.arange(37)}


@case("one anchor without positives among others that have some")
def singleton(g):
    return {"features": randn(g, 20, 8), "labels": torch.tensor([7] + [1, 2] * 9 + [1])}


@case("similarity 1 to a positive and to a negative")
def duplicated_rows(g):
    return {"features": randn(g, 25, 12).repeat(3, 1), "labels": classes(g, 75, 4)}


@case("labels are names, not indices; no id is ignore_index")
def negative_and_huge_labels(g):
    names = torch.tensor([-1, -(2**62), 2**62, 0, 2**40])
    return {"features": randn(g, 45, 16), "labels": names[classes(g, 45, 5)]}


@case("labels in a narrow dtype")
def byte_labels(g):
    return {"features": randn(g, 30, 8), "labels": classes(g, 30, 3).to(torch.uint8)}


@case("ignored rows hold garbage that must not reach anything")
def ignored_garbage(g):
    features, labels = randn(g, 60, 16), classes(g, 60, 4)
    labels[::7] = NOWHERE
    features[::14], features[7::14] = torch.nan, torch.inf
    return {"features": features, "labels": labels}


@case("every row ignored: no anchor at all")
def all_ignored(g):
    return {"features": randn(g, 9, 4), "labels": torch.full((9,), NOWHERE)}


@case("soft labels: every pair is positive with some weight")
def soft_labels(g):
    return {"features": randn(g, 40, 16), "labels": randn(g, 40, 5).mul(2).softmax(dim=1)}


@case("multi-hot labels, integers as floats, some samples without any")
def multi_hot(g):
    hot = (torch.rand(44, 6, generator=g) < 0.25).float()
    return {"features": randn(g, 22, 2, 16), "labels": hot[:22]}


@case("soft labels so sharp that a weight is 1e-12 of another")
def saturated_soft_labels(g):
    logits = torch.nn.functional.one_hot(classes(g, 36, 6), 6).double() * 28 + randn(g, 36, 6)
    return {"features": randn(g, 36, 16), "labels": logits.softmax(dim=1)}


@case("soft labels so sharp that the weight of a pair is 1e-39, below float32")
def tiny_weights(g):
    rows = torch.eye(6, dtype=torch.float64)[torch.tensor([0, 0, 1, 1, 2, 3])]
    return {"features": randn(g, 6, 4), "labels": (90 * rows).softmax(dim=1)}


@case("two samples share a class of labels of 1e-42, far below all others")
def tiny_class(g):
    labels = torch.eye(3, dtype=torch.float64)[torch.tensor([0, 0, 1, 1, 0, 2, 2])]
    labels[5:] *= 1e-42
    return {"features": randn(g, 7, 4), "labels": labels}


@case("labels that are not scaled: the weight of a pair is 1e50, beyond float32")
def huge_weights(g):
    return {"features": randn(g, 12, 4), "labels": torch.rand(12, 3, generator=g) * 1e25}


@case("more soft classes and rows than tiles take, in 16 bits; some rows are alone in their class")
def many_soft_classes(g):
    logits = 12.0 * torch.nn.functional.one_hot(classes(g, 330, 160), 800) + randn(g, 330, 800)
    return {"features": randn(g, 330, 24), "labels": logits.softmax(dim=1).bfloat16()}


@case("integer labels as a column")
def column_labels(g):
    return {"features": randn(g, 15, 2, 8), "labels": classes(g, 15, 3)[:, None]}


@case("one-hot labels as booleans")
def boolean_labels(g):
    hot = torch.nn.functional.one_hot(classes(g, 30, 3), 3).bool()
    return {"features": randn(g, 30, 8), "labels": hot}


# --- masks


@case("a boolean mask of samples, over two views")
def sample_mask(g):
    mask = torch.rand(20, 20, generator=g) < 0.3
    return {"features": randn(g, 20, 2, 16), "mask": mask}


@case("an asymmetric weighted mask of rows with ignored pairs")
def weighted_mask(g):
    mask = torch.rand(40, 40, generator=g).sub(0.6).mul(5)
    mask[mask.abs() < 1.5] = 0
    return {"features": randn(g, 20, 2, 16), "mask": mask}


@case("an asymmetric mask of bytes, read column by column, repeated within tiles")
def mask_of_several_tiles(g):
    mask = torch.randint(-1, 3, (90, 90), generator=g, dtype=torch.int8).T
    return {"features": randn(g, 90, 3, 24), "mask": mask}


@case("a mask with only first views as anchors")
def first_view_mask(g):
    mask = (torch.rand(20, 20, generator=g) < 0.3).int()
    return {"features": randn(g, 20, 2, 16), "mask": mask, "contrast_mode": "one"}


# --- other rows to contrast with


@case("a labelled memory")
def memory(g):
    return {
        "features": randn(g, 31, 16),
        "labels": classes(g, 31, 5),
        "contrast_features": randn(g, 77, 16),
        "contrast_labels": classes(g, 77, 5),
    }


@case("a memory that is partly empty, the slots holding garbage, and ignored anchors")
def half_empty_memory(g):
    args = memory_arguments(g)
    args["contrast_features"][:20] = torch.nan
    args["contrast_labels"][:20] = NOWHERE
    args["labels"][3] = NOWHERE
    args["features"][3] = torch.inf
    return args


@case("a memory that holds the anchors themselves")
def self_in_memory(g):
    args = memory_arguments(g)
    features, labels = args["features"], args["labels"]
    memory, names = args["contrast_features"], args["contrast_labels"]
    return {
        **args,
        "contrast_features": torch.cat((memory[:10], features, memory[10:])),
        "contrast_labels": torch.cat((names[:10], labels, names[10:])),
        "self_offset": 10,
    }


@case("a memory that holds the anchors under other labels, or ignores them")
def relabelled_self_in_memory(g):
    args = by_id("self_in_memory").build(g)
    args["contrast_labels"][10:20] = (args["contrast_labels"][10:20] + 1) % 5
    args["contrast_labels"][25] = NOWHERE
    return args


@case("an empty memory: no anchor contributes")
def empty_memory(g):
    args = memory_arguments(g)
    args["contrast_features"] = args["contrast_features"][:0]
    args["contrast_labels"] = args["contrast_labels"][:0]
    return args


@case("two towers without labels, and keys in front of a queue; first views only")
def towers(g):
    return {"features": randn(g, 20, 2, 16), "contrast_features": randn(g, 50, 16)}


@case("soft labels against a memory's")
def soft_memory(g):
    return {
        "features": randn(g, 18, 8),
        "labels": torch.rand(18, 4, generator=g),
        "contrast_features": randn(g, 27, 8),
        "contrast_labels": torch.rand(27, 4, generator=g),
    }


@case("soft labels against a memory that holds the anchors, one of them alone in its classes")
def soft_self_in_memory(g):
    features, labels = randn(g, 18, 8), torch.rand(18, 4, generator=g, dtype=torch.float64)
    labels[5] = torch.tensor([1.0, 1e-13, 1e-13, 1e-13])
    labels[:5, 0], labels[6:, 0] = 1e-13, 1e-13
    return {
        "features": features,
        "labels": labels,
        "contrast_features": torch.cat((randn(g, 3, 8), features, randn(g, 4, 8))),
        "contrast_labels": torch.cat((labels[:3], labels, labels[6:10])),
        "self_offset": 3,
    }


@case("soft labels of many anchors in the midst of a memory, scaled by rows that are not")
def many_soft_rows_in_memory(g):
    features, labels = randn(g, 150, 8), torch.rand(150, 9, generator=g, dtype=torch.float64)
    labels[::9] = torch.nn.functional.one_hot(classes(g, 17, 9), 9) + 1e-9
    features[40] *= 50
    return {
        "features": features,
        "labels": labels,
        "contrast_features": torch.cat((randn(g, 37, 8), features, randn(g, 20, 8))),
        "contrast_labels": torch.cat((labels[:37], labels, labels[9:29])),
        "self_offset": 37,
        "normalize": False,
        "temperature": 2.0,
    }


@case("a mask against a memory, itself included")
def masked_memory(g):
    features, mask = randn(g, 15, 8), torch.rand(15, 40, generator=g).sub(0.5)
    return {
        "features": features,
        "contrast_features": torch.cat((features, randn(g, 25, 8))),
        "mask": mask,
        "self_offset": 0,
    }


# --- both directions


def both(a: Tensor, b: Tensor, **arguments: Any) -> Arguments:
    """The arguments of a call with both directions of two sides."""
    return {"features": a, "contrast_features": b, "symmetric": True, **arguments}


@case("CLIP: two towers, both directions, over several tiles")
def symmetric_towers(g):
    images, noise = randn(g, 2, 140, 8)
    return both(images, noise + 0.3 * images)


@case("both directions, exponents that need a shift")
def symmetric_cold_towers(g):
    return {**by_id("symmetric_towers").build(g), "temperature": 0.01}


@case("both directions of wide rows")
def symmetric_wide(g):
    return both(*randn(g, 2, 20, 260))


@case("both directions with labels, sides of different lengths, ignored garbage on both")
def symmetric_memory(g):
    return {**by_id("half_empty_memory").build(g), "symmetric": True}


@case("both directions over several tiles, many positives in each class, first views")
def symmetric_tiles(g):
    labels, names = classes(g, 150, 5), classes(g, 100, 6)
    return both(randn(g, 150, 2, 12), randn(g, 100, 12), labels=labels, contrast_labels=names)


@case("both directions of a weighted mask with ignored pairs, a row and a column without positives")
def symmetric_mask(g):
    mask = torch.rand(90, 130, generator=g).sub(0.7).mul(3)
    mask[mask.abs() < 0.8] = 0
    mask[4], mask[:, 9] = 0, 0
    return both(randn(g, 90, 16), randn(g, 130, 16), mask=mask)


@case("both directions with soft labels, some of them nearly one-hot")
def symmetric_soft(g):
    labels = torch.rand(88, 4, generator=g, dtype=torch.float64)
    labels[::3] = (40 * labels[::3]).softmax(dim=1)
    sides = randn(g, 18, 8), randn(g, 70, 8)
    return both(*sides, labels=labels[:18], contrast_labels=labels[18:])


def memory_arguments(g: torch.Generator) -> Arguments:
    """A labelled memory, for cases that change something about it."""
    return by_id("memory").build(g)


# --- numbers


@case("exponents up to 200: beyond what one shift of float32 holds")
def cold(g):
    labels = classes(g, 64, 4)
    return {"features": randn(g, 64, 8), "labels": labels, "temperature": 0.01}


@case("close to uniform")
def hot(g):
    return {"features": randn(g, 64, 8), "labels": classes(g, 64, 4), "temperature": 5.0}


@case("rows taken as they are, norms around 3, and one far out")
def unnormalised(g):
    features = randn(g, 50, 9)
    features[4] *= 8
    labels = classes(g, 50, 4)
    return {"features": features, "labels": labels, "normalize": False, "temperature": 1.0}


@case("a row of norm 1e4: what it adds to the sum of its class must come off again for itself")
def outlier(g):
    features = torch.nn.functional.normalize(randn(g, 60, 12))
    features[7] *= 1e4
    labels = classes(g, 60, 2)
    return {"features": features, "labels": labels, "normalize": False, "temperature": 1.0}


@case("norms over six decades, and rows of zeros")
def uneven_norms(g):
    features = randn(g, 48, 16) * torch.logspace(-3, 3, 48, dtype=torch.float64)[:, None]
    features[5] = features[17] = 0.0
    return {"features": features, "labels": classes(g, 48, 4)}


@case("well separated classes late in training: the loss is small")
def converged(g):
    labels = classes(g, 60, 6)
    return {"features": randn(g, 6, 16)[labels] * 3 + 0.2 * randn(g, 60, 16), "labels": labels}


@case("equal rows that nothing is a positive of: no weight of 0 may meet a power that overflows")
def cold_twins(g):
    features, labels = randn(g, 40, 8), classes(g, 40, 3)
    features[1], features[17] = features[0], features[0]
    labels[0], labels[1] = 97, 98
    return {"features": features, "labels": labels, "temperature": 0.01}


@case("one class only, so that nothing is negative, and exponents that overflow")
def cold_one_class(g):
    labels = torch.zeros(30, dtype=torch.int64)
    return {"features": randn(g, 30, 8), "labels": labels, "temperature": 0.01}
