"""How good the embedding of a run is: what its classifiers make of the test images."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from checkpoint import RunState
from data import ImageData, Split
from knn import accuracy, embed, encode_stored, knn_predictions, pixels
from model import Embedder
from sources import subset
from step import Trainer


class Evaluation:
    """Measures a trainer's network on test images, classified by their nearest training images.

    Args:
        before_batch: called before every batch; what it raises breaks the evaluation off, which
            changes nothing and may take minutes.
    """

    def __init__(
        self, trainer: Trainer, data: ImageData, *, before_batch: Callable[[], None]
    ) -> None:
        self.trainer = trainer
        self.test = data.test
        self.num_classes = len(data.classes)
        self.bank = subset(data.train, trainer.config.knn_bank)
        self.before_batch = before_batch
        self.places: dict[str, Any] = {
            "device": trainer.device,
            "workers": trainer.config.workers,
        }
        self.ranks = trainer.ranks

    def baselines(self) -> RunState:
        """The state of a run before its first step."""
        self.trainer.copy_statistics()
        untrained = accuracy(self.predictions(), self.test.labels)
        raw_pixels = accuracy(self._knn(pixels), self.test.labels)
        return RunState(raw_pixels=raw_pixels, untrained=untrained, accuracy=untrained)

    def measure(self, state: RunState) -> None:
        """Bring the accuracies in a run's state up to date."""
        self.trainer.copy_statistics()
        state.accuracy = accuracy(self.predictions(), self.test.labels)
        if self.trainer.probe is not None:
            # Of the very encoder that it is trained on, beside which there may be an average.
            encode = partial(self._encode, self.trainer.model)
            state.probe = self.trainer.probe.accuracy(encode, self.test, **self.places)

    def predictions(self) -> Tensor:
        """The (N,) classes of the test images by k-NN."""
        return self._knn(partial(self._encode, self.trainer.measured))

    def embed(self, split: Split) -> Tensor:
        """The (N, F) embeddings of a split."""
        encode = partial(self._encode, self.trainer.measured)
        return embed(encode, split, ranks=self.ranks, **self.places)

    def _knn(self, encode: Callable[[Tensor], Tensor]) -> Tensor:
        return knn_predictions(
            encode,
            self.test,
            self.bank,
            num_classes=self.num_classes,
            ranks=self.ranks,
            **self.places,
        )

    def _encode(self, model: Embedder, images: Tensor) -> Tensor:
        self.before_batch()
        return encode_stored(model, self.trainer.views, images)
