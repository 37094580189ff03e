"""Supervised and self-supervised contrastive learning: the views of a step with each other.

Khosla et al., Supervised Contrastive Learning, arXiv 2004.11362; Chen et al., SimCLR, 2002.05709.
"""

import math
import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from data.images import ImageData
from methods.method import Method
from run.errors import UserError
from run.processes import ALONE, Ranks
from run.rules import out_of_range
from supcon_kernels import supcon_loss


@dataclass
class MethodOptions:
    """The loss.

    Args:
        method: supcon: images of one class attract each other; simclr: only the views of one
            image do (labels are not used in training).
        temperature: Of the loss.
        base_temperature: Multiply the loss by temperature / base_temperature, so that the size of a step
            does not follow the temperature. 1: as the SupCon authors' code; 0.07: as SupContrast's.
            Default: do not.
    """

    method: Literal["supcon", "simclr"] = "supcon"
    temperature: float = 0.1
    base_temperature: float | None = None

    def mistakes(self) -> list[str]:
        """What is out of range, one sentence each."""
        return out_of_range(self, greater_than_0=("temperature", "base_temperature"))

    @property
    def loss_scale(self) -> float:
        """What the contrastive loss is multiplied by."""
        return self.temperature / (self.base_temperature or self.temperature)


class Contrastive(Method):
    """The supervised contrastive loss over the views of all processes.

    Args:
        num_rows: the views of a step, of all processes together.
    """

    of_all_ranks = True

    def __init__(self, options: MethodOptions, *, num_rows: int, ranks: Ranks = ALONE) -> None:
        super().__init__()
        self.options = options
        self.ranks = ranks
        self.group: dist.ProcessGroup | str | None = ranks.group
        self.scale = options.loss_scale
        # Every similarity is the same: the logarithm of their number, whatever the temperature.
        self.collapsed_loss = self.scale * math.log(num_rows - 1)

    def check(self, data: ImageData) -> None:
        """With labels, refuse one class alone; warn of classes of one image."""
        if self.options.method == "supcon":
            check_classes(data)

    def targets(self, labels: Tensor, step: int) -> Tensor:
        """The labels; for SimCLR a class for each image that no other has, be it of another step."""
        if self.options.method == "supcon":
            return labels
        share = step * self.ranks.world_size + self.ranks.rank
        return torch.arange(len(labels), device=labels.device) + share * len(labels)

    def forward(self, embedded: Tensor, projected: Tensor, targets: Tensor) -> Tensor:
        """The loss of (V·B, D) projections, view by view, of images with (B,) classes."""
        features = projected.float().unflatten(0, (-1, len(targets))).transpose(0, 1)
        return supcon_loss(
            features,
            targets,
            temperature=self.options.temperature,
            base_temperature=self.options.base_temperature,
            group=self.group,
            **self.contrast(),
        )

    def contrast(self) -> dict[str, Any]:
        """The arguments of supcon_loss that name what the views are contrasted with."""
        return {}


def check_classes(data: ImageData) -> None:
    """Refuse data with one class alone, of which no loss with labels learns; warn of single images.

    Raises:
        UserError: there is one class.
    """
    counts = torch.bincount(data.train.labels, minlength=len(data.classes)).tolist()
    present = [name for name, count in zip(data.classes, counts) if count > 0]
    if len(present) < 2:
        raise UserError(
            f"{data.name} has one class alone, {present[0]!r}: nothing to tell apart "
            "(--method simclr trains without labels)"
        )
    for name, count in zip(data.classes, counts):
        if count == 1:
            print(
                f"warning: class {name!r} has one training image, whose only positive is its own "
                "other view",
                file=sys.stderr,
            )
