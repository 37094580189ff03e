"""A linear classifier trained beside the encoder: how separable the classes are while they form."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Split
from knn import accuracy, embed
from optim import load_optimizer
from ranks import ALONE, Ranks

LEARNING_RATE = 1e-3


class Probe:
    """Logistic regression on standardised embeddings, which get no gradient from it.

    It draws no random number: with or without it the encoder trains the same.
    """

    def __init__(
        self, num_features: int, num_classes: int, device: torch.device, ranks: Ranks = ALONE
    ) -> None:
        # Built without its first weights, which nn.Linear would draw.
        layer = nn.utils.skip_init(nn.Linear, num_features, num_classes, device=device)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        scale = nn.BatchNorm1d(num_features, affine=False, device=device)
        self.classifier = nn.Sequential(scale, layer)
        self.optimizer = torch.optim.Adam(layer.parameters(), lr=LEARNING_RATE)
        self.ranks = ranks

    def step(self, embedded: Tensor, labels: Tensor) -> None:
        """Train on (V*B, F) embeddings, view by view, of images with (B,) labels."""
        logits = self.classifier.train()(embedded.detach().float())
        loss = F.cross_entropy(logits, labels.repeat(len(embedded) // len(labels)))
        self.optimizer.zero_grad()
        loss.backward()
        for weight in self.classifier.parameters():
            assert weight.grad is not None
            weight.grad = self.ranks.mean(weight.grad)
        self.optimizer.step()

    def accuracy(
        self, encode: Callable[[Tensor], Tensor], test: Split, *, device: torch.device, workers: int
    ) -> float:
        """The share of test images that it classifies rightly; arguments as of knn.embed."""
        self.classifier.eval()
        logits = embed(
            lambda images: self.classifier(encode(images).float()),
            test,
            device=device,
            workers=workers,
            ranks=self.ranks,
        )
        return accuracy(logits.argmax(1).cpu(), test.labels)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {
            "classifier": self.classifier.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.classifier.load_state_dict(saved["classifier"])
        load_optimizer(self.optimizer, saved["optimizer"])
