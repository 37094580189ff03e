"""The memory variant of the loss: queries against a queue of keys from a momentum encoder.

He et al., Momentum Contrast, arXiv 1911.05722; with labels in the appendix of arXiv 2004.11362.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from methods.contrastive import Contrastive, MethodOptions
from network.embedder import PROJECTION_DIM
from network.momentum_encoder import MomentumEncoder
from run.processes import ALONE, Ranks
from run.rules import LARGEST, broken, out_of_range
from supcon_kernels import LabelQueue


@dataclass
class QueueOptions:
    """A queue of keys from a momentum encoder (MoCo).

    Args:
        queue_size: Contrast the first view of each image with a queue of so many keys, such as 8192:
            the other views of this step's and of earlier images, embedded without gradient by an
            average of the weights (MoCo). Default: the views of a step with each other.
        queue_momentum: The share of that average which a step keeps.
    """

    queue_size: int | None = None
    queue_momentum: float = 0.999

    def mistakes(self) -> list[str]:
        """What is out of range or contradicts itself, one sentence each."""
        rules = [
            (
                self.queue_size is not None or self.queue_momentum == QueueOptions.queue_momentum,
                "--queue_momentum contradicts the absence of a queue: give --queue_size",
            ),
            (
                0 <= self.queue_momentum < 1,
                f"--queue_momentum {self.queue_momentum}: must be at least 0 and less than 1",
            ),
        ]
        return broken(rules) + out_of_range(self, at_most={"queue_size": LARGEST})


class MomentumQueue(Contrastive):
    """The first view of each image against the last keys, which a momentum encoder makes of the others.

    Args:
        encoder: makes the keys, on the device of the queue to be.
        ranks: whose queues hold the keys of all.
    """

    num_embedded = 1
    of_all_ranks = False

    def __init__(
        self,
        options: MethodOptions,
        encoder: MomentumEncoder,
        *,
        queue_size: int,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(options, num_rows=queue_size + 1, ranks=ranks)
        # While it fills a collapse has no loss of its own; then all slots are contrasted.
        self.collapsed_loss = self.scale * math.log(queue_size)
        # What it holds is the same for all processes; their queries are their own.
        self.group = "local"
        self.encoder = encoder
        self.traits = ["keys shuffled among processes"] if encoder.shuffles else []
        self.queue = LabelQueue(queue_size, PROJECTION_DIM, device=encoder.device)

    @torch.no_grad()
    def prepare(self, views: list[Tensor], targets: Tensor, step: int) -> None:
        """Enqueue the keys of all views but the first."""
        keys = self.encoder(torch.cat(views[1:]), step)
        self.queue.enqueue(keys, targets.repeat(len(views) - 1), group=self.ranks.group)

    def contrast(self) -> dict[str, Any]:
        """The keys in the queue, and their classes."""
        return {"contrast_features": self.queue.features, "contrast_labels": self.queue.labels}

    @torch.no_grad()
    def follow(self, network: nn.Module) -> None:
        """Move the momentum encoder towards the network."""
        self.encoder.follow(network)

    def restart(self, network: nn.Module) -> None:
        """Begin with the network as it is."""
        self.encoder.restart(network)
