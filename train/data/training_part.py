"""The part of a training set that a run learns from: fewer images, a long tail, wrong labels.

Which images and labels these are is a pure function of the labels and the seed. A smaller part lies
within a larger one.
"""

from dataclasses import replace

import torch
from torch import Tensor

from data.images import Split
from run.errors import UserError
from run.seeds import seed_of

# Tell the seeds of what is drawn here from others of the same run.
IMBALANCE, PART, NOISE = 4, 5, 6


def training_part(
    train: Split,
    *,
    imbalance: float | None,
    train_images: int | None,
    label_noise: float | None,
    seed: int,
) -> Split:
    """Of a training set first a long tail, then so many images, then labels that are wrong.

    Args:
        imbalance: how many times as large as the last class the first is.
        train_images: as many images, of each class its share.
        label_noise: the share of the labels that become another class's.

    Raises:
        UserError: there are too few images.
    """
    if imbalance is not None:
        counts = long_tail(train.labels, imbalance)
        train = train.take(drawn(train.labels, counts, seed=(seed, IMBALANCE)))
    if train_images is not None:
        num_classes = train.labels.unique().numel()
        if not num_classes <= train_images <= len(train):
            raise UserError(
                f"--train_images {train_images}: must be from {num_classes}, one of each class, to "
                f"{len(train)}, the images of the training set"
            )
        counts = shares(train.labels, train_images)
        train = train.take(drawn(train.labels, counts, seed=(seed, PART)))
    if label_noise is not None:
        train = replace(train, labels=with_noise(train.labels, label_noise, seed=(seed, NOISE)))
    return train


def long_tail(labels: Tensor, ratio: float) -> dict[int, int]:
    """How many images of each class stay, falling exponentially from the first class to the last.

    The profile of Cao et al., Learning Imbalanced Datasets with LDAM, arXiv 1906.07413; no class
    has more than there are.
    """
    classes, sizes = labels.unique(return_counts=True)
    largest, last = int(sizes.max()), max(len(classes) - 1, 1)
    wanted = [int(largest * ratio ** (-place / last)) for place in range(len(classes))]
    return {
        label: max(min(size, count), 1)
        for label, size, count in zip(classes.tolist(), sizes.tolist(), wanted)
    }


def shares(labels: Tensor, count: int) -> dict[int, int]:
    """How many images of each class are in a part of `count`: one, and its share of the others."""
    classes, sizes = labels.unique(return_counts=True)
    others, left = count - len(classes), len(labels) - len(classes)
    exact = (sizes - 1) * others / max(left, 1)
    counts = exact.floor().long()
    # What rounding has left goes where it took most.
    missing = others - int(counts.sum())
    counts[(exact - counts).argsort(descending=True, stable=True)[:missing]] += 1
    return dict(zip(classes.tolist(), (counts + 1).tolist()))


def drawn(labels: Tensor, counts: dict[int, int], *, seed: tuple[int, ...]) -> list[int]:
    """The indices, in order, of so many images of each class."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label, count in counts.items():
        members = (labels == label).nonzero().flatten()
        generator = torch.Generator().manual_seed(seed_of(*seed, label))
        chosen[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return chosen.nonzero().flatten().tolist()


def with_noise(labels: Tensor, share: float, *, seed: tuple[int, ...]) -> Tensor:
    """The labels, a share of which are those of another class, each as likely."""
    classes, places = labels.unique(return_inverse=True)
    generator = torch.Generator().manual_seed(seed_of(*seed))
    wrong = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    moves = torch.randint(1, max(len(classes), 2), (len(wrong),), generator=generator)
    places[wrong] = (places[wrong] + moves) % len(classes)
    noisy: Tensor = classes[places]
    return noisy
