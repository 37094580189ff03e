"""SupCon: the views of a step with each other, images of one class attract each other.

Khosla et al., Supervised Contrastive Learning, arXiv 2004.11362.
"""

import math
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.images import ImageData
from methods.method import Method, Setup
from methods.options import MethodOptions
from supcon_kernels import supcon_loss

# A learned temperature stays above it; CLIP has the same bound.
LEAST_TEMPERATURE = 0.01


class Contrastive(Method):
    """The contrastive loss over the views of all processes, by classes or without labels."""

    of_all_ranks = True

    def __init__(self, options: MethodOptions, setup: Setup) -> None:
        super().__init__()
        self.options = options
        self.ranks = setup.ranks
        self.group: dist.ProcessGroup | str | None = setup.ranks.group
        self.scale = options.scale
        if options.denominator == "all":
            # Every similarity is the same: the logarithm of their number, whatever the temperature.
            self.collapsed_loss = self.scale * math.log(setup.num_views * setup.batch_size - 1)
        self.log_change: nn.Parameter | None = None
        if options.learn_temperature:
            # From the temperature given on, to which weight decay returns it.
            self.log_change = nn.Parameter(torch.zeros(()))

    @property
    def temperature(self) -> float | Tensor:
        """As given, or as learned so far."""
        if self.log_change is None:
            return self.options.temperature
        learned: Tensor = self.options.temperature * self.log_change.exp()
        return learned.clamp(min=LEAST_TEMPERATURE)

    def figures(self) -> dict[str, float]:
        """The temperature, where it is learned."""
        learned = self.temperature
        return {"temperature": learned.item()} if isinstance(learned, Tensor) else {}

    def check(self, data: ImageData) -> None:
        """With labels, refuse one class alone; warn of classes of one image."""
        super().check(data)
        if not self.uses_labels:
            return
        counts = torch.bincount(data.train.labels, minlength=len(data.classes)).tolist()
        for name, count in zip(data.classes, counts):
            if count == 1:
                print(
                    f"warning: class {name!r} has one training image, whose only positive is its "
                    "own other view",
                    file=sys.stderr,
                )

    def targets(self, labels: Tensor, step: int) -> Tensor:
        """The labels; without them a class for each image that no other has, be it of another step."""
        if self.uses_labels:
            return labels
        share = step * self.ranks.world_size + self.ranks.rank
        return torch.arange(len(labels), device=labels.device) + share * len(labels)

    def forward(self, embedded: Tensor, projected: Tensor, targets: Tensor) -> Tensor:
        """The loss of (V·B, D) projections, view by view, of images with (B,) classes."""
        features = projected.float().unflatten(0, (-1, len(targets))).transpose(0, 1)
        return self.contrast(features, targets)

    def contrast(self, features: Tensor, targets: Tensor | None, **others: Any) -> Tensor:
        """The loss of (B, V, D) features, or (B, D).

        Args:
            others: the arguments of supcon_loss that name other rows to contrast with.
        """
        return supcon_loss(
            features,
            targets,
            temperature=self.temperature,
            base_temperature=self.options.base_temperature,
            summation=self.options.summation,
            denominator=self.options.denominator,
            group=self.group,
            **others,
        )
