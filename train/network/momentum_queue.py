"""The memory variant of the loss: queries against a queue of keys, which a slower network embeds.

He et al., Momentum Contrast, arXiv 1911.05722; with labels in the appendix of arXiv 2004.11362.
"""

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from network.embedder import PROJECTION_DIM, Embedder
from run.config import PretrainConfig
from run.processes import ALONE, Ranks
from supcon_kernels import LabelQueue


class MomentumQueue(nn.Module):
    """The last keys and their labels, and the average of a network's weights that makes them.

    Args:
        model: the network that is trained, on the device of the queue to be.
        config: with a queue_size.
        ranks: whose queues hold the keys of all.
    """

    def __init__(self, model: Embedder, config: PretrainConfig, ranks: Ranks = ALONE) -> None:
        super().__init__()
        assert config.queue_size is not None
        self.average = ModelEmaV3(model, decay=config.queue_momentum)
        # Keys are normalised as queries are, by the statistics of their batch.
        self.average.module.train()
        if config.compile:
            self.average.module.compile(dynamic=False)
        self.group = ranks.group
        self.chunk = config.grad_cache_chunk
        device = next(model.parameters()).device
        self.queue = LabelQueue(config.queue_size, PROJECTION_DIM, device=device)

    @torch.no_grad()
    def remember(self, views: Tensor, labels: Tensor) -> None:
        """Enqueue the keys of (K*B, C, s, s) views, view by view, of images with (B,) labels."""
        keys = torch.cat(
            [self.average(chunk)[1] for chunk in views.split(self.chunk or len(views))]
        )
        self.queue.enqueue(keys, labels.repeat(len(views) // len(labels)), group=self.group)

    def contrast(self) -> dict[str, Tensor]:
        """The arguments of supcon_loss that contrast queries with the queue."""
        return {"contrast_features": self.queue.features, "contrast_labels": self.queue.labels}
