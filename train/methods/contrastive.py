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
from run.errors import UserError
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
        if options.max_positives is not None and self.ranks.world_size > 1:
            raise UserError("--max_positives needs one process: the mask is of the images of one")
        self.num_others: int | None = None
        if options.max_positives is not None:
            self.num_others = (options.max_positives + 1) // setup.num_views - 1
        elif options.denominator == "all":
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
        if self.num_others is None:
            return self.contrast(features, targets)
        return self.contrast(features, None, mask=mask_of_some(targets, self.num_others))

    def contrast(self, features: Tensor, targets: Tensor | None, **others: Any) -> Tensor:
        """The loss of (B, V, D) features, or (B, D).

        Args:
            others: the arguments of supcon_loss that name positives or other rows to contrast with.
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


def mask_of_some(labels: Tensor, num_others: int) -> Tensor:
    """The (B, B) mask of (B,) labels in which an image has few positives: the first others of its class.

    1 for the image itself and for them, 0 for other classes, -1 for the rest of its class, which leaves
    the denominator, too: as `positives_cap` in the code of the paper's authors.
    """
    same = labels[:, None] == labels
    others = same.clone().fill_diagonal_(False)
    surplus = others & (others.cumsum(1) > num_others)
    return same.float() - 2 * surplus.float()
