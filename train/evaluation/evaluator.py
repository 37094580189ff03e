"""How good the embedding of a run is: what its classifiers make of images that it is not trained on."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.images import ImageData, Split
from data.sources import evenly_drawn, subset
from evaluation.embeddings import Share, embed, embed_share, encode_stored, pixels
from evaluation.knn import NEIGHBOURS, TEMPERATURE, accuracy, knn_predict
from network.embedder import Embedder
from run.checkpoint import RunState
from run.rules import out_of_range
from training.trainer import Trainer


class Tested(NamedTuple):
    """What a run ends with: the embeddings of some test images, and the classes of all.

    Attributes:
        embeddings: (M, F), of images with the (M,) `labels`.
        predictions: (N,), by k-NN.
    """

    embeddings: Tensor
    labels: Tensor
    predictions: Tensor
    knn_accuracy: float
    probe_accuracy: float | None


@dataclass
class EvaluationOptions:
    """Measuring the embedding.

    Args:
        probe: Also train a linear classifier on the embeddings. It is evaluated with k-NN. The
            encoder gets no gradient from it.
        knn_every: Epochs between k-NN evaluations. 0: only before the first and after the last.
        knn_k: Number of neighbours.
        knn_temperature: A neighbour has the weight exp(cosine similarity / knn_temperature).
        knn_bank: Number of training images to search. 0: all.
    """

    probe: bool = False
    knn_every: int = 10
    knn_k: int = NEIGHBOURS
    knn_temperature: float = TEMPERATURE
    knn_bank: int = 0

    def mistakes(self) -> list[str]:
        """What is out of range, one sentence each."""
        return out_of_range(
            self,
            at_least={"knn_every": 0, "knn_k": 1, "knn_bank": 0},
            greater_than_0=("knn_temperature",),
        )


class Evaluator:
    """Classifies images by their nearest training images, in the embedding of a trainer's network.

    During the run these are the validation images, or the test images where there are no others.

    Args:
        workers: processes that load images.
        before_batch: called before every batch; what it raises breaks the evaluation off, which
            changes nothing and may take minutes.
    """

    def __init__(
        self,
        trainer: Trainer,
        data: ImageData,
        options: EvaluationOptions,
        *,
        workers: int,
        before_batch: Callable[[], None],
    ) -> None:
        self.trainer = trainer
        self.options = options
        self.workers = workers
        self.watched = data.test if data.validation is None else data.validation
        self.test = data.test
        self.num_classes = len(data.classes)
        self.bank = subset(data.train, options.knn_bank)
        self.before_batch = before_batch
        # By the network as it is: no split is encoded twice until the weights move. Of the training
        # images each process keeps its share.
        self.embedded: dict[Split, Tensor] = {}
        self.neighbours: Share | None = None

    def weights_move(self) -> None:
        """Drop what was encoded by the weights so far."""
        self.embedded.clear()
        self.neighbours = None

    def baselines(self) -> RunState:
        """The state of a run before its first step."""
        self.trainer.broadcast_statistics()
        num_features = self.trainer.measured.num_features

        def encode(images: Tensor) -> Tensor:
            # Every image is read once for both: decoding may take longer than the network.
            return torch.cat([self._encode(self.trainer.measured, images), pixels(images)], 1)

        watched, bank = self._embed(encode, self.watched), self._embed_share(encode, self.bank)
        untrained, raw_pixels = (
            accuracy(
                self._classify(watched[:, part], bank._replace(rows=bank.rows[:, part])),
                self.watched.labels,
            )
            for part in (slice(num_features), slice(num_features, None))
        )
        return RunState(raw_pixels=raw_pixels, untrained=untrained, accuracy=untrained)

    def measure(self, state: RunState) -> None:
        """Bring the accuracies in a run's state up to date."""
        self.trainer.broadcast_statistics()
        state.accuracy = accuracy(self.predictions(self.watched), self.watched.labels)
        state.probe = self._probe_accuracy(self.watched)

    def at_the_end(self, *, num_drawn: int) -> Tested:
        """Look at the test images; up to `num_drawn` of their embeddings are to be drawn."""
        drawn = evenly_drawn(len(self.test), num_drawn)
        predictions = self.predictions(self.test)
        return Tested(
            embeddings=self.embed(self.test)[drawn],
            labels=self.test.labels[drawn],
            predictions=predictions,
            knn_accuracy=accuracy(predictions, self.test.labels),
            probe_accuracy=self._probe_accuracy(self.test),
        )

    def predictions(self, split: Split) -> Tensor:
        """The (N,) classes of the images of a split by k-NN, on the CPU."""
        queries = self.embed(split)
        if self.neighbours is None:
            encode = partial(self._encode, self.trainer.measured)
            self.neighbours = self._embed_share(encode, self.bank)
        return self._classify(queries, self.neighbours)

    def embed(self, split: Split) -> Tensor:
        """The (N, F) embeddings of a split."""
        if split not in self.embedded:
            encode = partial(self._encode, self.trainer.measured)
            self.embedded[split] = self._embed(encode, split)
        return self.embedded[split]

    def _probe_accuracy(self, split: Split) -> float | None:
        probe, model = self.trainer.probe, self.trainer.model
        if probe is None:
            return None
        # Of the very encoder that it is trained on, beside which there may be an average.
        is_measured = self.trainer.measured is model
        encode = partial(self._encode, model)
        embedded = self.embed(split) if is_measured else self._embed(encode, split)
        return accuracy(probe.predictions(embedded), split.labels)

    def _classify(self, queries: Tensor, bank: Share) -> Tensor:
        predictions = knn_predict(
            queries,
            bank,
            self.bank.labels,
            num_classes=self.num_classes,
            neighbours=self.options.knn_k,
            temperature=self.options.knn_temperature,
        )
        return predictions.cpu()

    def _embed(self, encode: Callable[[Tensor], Tensor], split: Split) -> Tensor:
        return embed(encode, split, **self._place())

    def _embed_share(self, encode: Callable[[Tensor], Tensor], split: Split) -> Share:
        return embed_share(encode, split, **self._place())

    def _place(self) -> dict[str, Any]:
        trainer = self.trainer
        return {"device": trainer.device, "workers": self.workers, "ranks": trainer.ranks}

    def _encode(self, model: Embedder, images: Tensor) -> Tensor:
        self.before_batch()
        return encode_stored(model, self.trainer.views, images)
