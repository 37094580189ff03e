"""A linear classifier trained beside the encoder: how separable the classes are while they form."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from run.processes import ALONE, Ranks
from training.optimizer import load_optimizer

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

    @torch.no_grad()
    def predictions(self, embedded: Tensor) -> Tensor:
        """The classes of images with (N, F) embeddings: (N,) on the CPU."""
        logits: Tensor = self.classifier.eval()(embedded.float())
        return logits.argmax(1).cpu()

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
