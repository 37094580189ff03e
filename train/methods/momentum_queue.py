"""The memory variant of the loss: queries against a queue of keys from a momentum encoder.

He et al., Momentum Contrast, arXiv 1911.05722; with labels in the appendix of arXiv 2004.11362.
"""

import math

import torch
from torch import Tensor, nn

from methods.contrastive import Contrastive
from methods.method import Setup
from methods.options import MethodOptions
from network.embedder import PROJECTION_DIM
from network.momentum_encoder import MomentumEncoder
from run.out_of_memory import out_of_memory_names
from supcon_kernels import LabelQueue


class MomentumQueue(Contrastive):
    """The first view of each image against the last keys, which a momentum encoder makes of the others.

    The queue, on the device of the network, holds the keys of all processes.
    """

    num_embedded = 1
    of_all_ranks = False

    def __init__(self, options: MethodOptions, setup: Setup) -> None:
        super().__init__(options, setup)
        size = options.num_keys
        assert size is not None
        if self.collapsed_loss is not None:
            # While it fills a collapse has no loss of its own; then all slots are contrasted.
            self.collapsed_loss = self.scale * math.log(size)
        # What it holds is the same for all processes; their queries are their own.
        self.group = "local"
        with out_of_memory_names(queue_size=size):
            self.encoder = MomentumEncoder(
                setup.model,
                momentum=options.queue_momentum,
                chunk=setup.chunk,
                compiled=setup.compiled,
                seed=setup.seed,
                ranks=setup.ranks,
            )
            self.queue = LabelQueue(size, PROJECTION_DIM, device=self.encoder.device)
        self.traits = ["keys shuffled among processes"] if self.encoder.shuffles else []

    @torch.no_grad()
    def prepare(self, views: list[Tensor], targets: Tensor, step: int) -> None:
        """Enqueue the keys of all views but the first."""
        keys = self.encoder(torch.cat(views[1:]), step)
        self.queue.enqueue(keys, targets.repeat(len(views) - 1), group=self.ranks.group)

    def forward(self, embedded: Tensor, projected: Tensor, targets: Tensor) -> Tensor:
        """The loss of (B, D) projections against the keys in the queue."""
        features, labels = self.queue.features, self.queue.labels
        return self.contrast(
            projected.float(), targets, contrast_features=features, contrast_labels=labels
        )

    @torch.no_grad()
    def follow(self, network: nn.Module) -> None:
        """Move the momentum encoder towards the network."""
        self.encoder.follow(network)

    def restart(self, network: nn.Module) -> None:
        """Begin with the network as it is."""
        self.encoder.restart(network)
