"""The order of training: a pure function of (seed, epoch), whatever the number of workers.

Several processes share out the batches that one would see.
"""

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import Sampler

from run.seeds import seed_of


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
