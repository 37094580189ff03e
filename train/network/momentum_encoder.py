"""The momentum encoder: an average of a network's weights that embeds keys without a gradient.

He et al., Momentum Contrast, arXiv 1911.05722.
"""

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from network.embedder import Embedder
from run.processes import ALONE, Ranks
from run.seeds import seed_of

# Tells the seeds of this shuffling from others of the same run.
SHUFFLING = 2


class MomentumEncoder(nn.Module):
    """An average of a network's weights, on the device of that network.

    Where batch norm takes the statistics of each process alone, a key would know its query by the
    statistics that both are normalised with. So the keys of all processes are shuffled among them,
    by a permutation that is a pure function of (seed, step).

    Args:
        momentum: the share of the average that a step keeps.
        chunk: so many views are embedded at a time; None: all.
        seed: of the shuffling.
    """

    def __init__(
        self,
        model: Embedder,
        *,
        momentum: float,
        chunk: int | None = None,
        compiled: bool = False,
        seed: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__()
        self.average = ModelEmaV3(model, decay=momentum)
        # Keys are normalised as queries are, by the statistics of their batch.
        self.average.module.train()
        self.average.requires_grad_(False)
        if compiled:
            self.average.module.compile(dynamic=False)
        self.chunk = chunk
        self.seed = seed
        self.ranks = ranks
        self.shuffles = ranks.group is not None and has_local_statistics(model)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.average.parameters()).device

    @torch.no_grad()
    def forward(self, views: Tensor, step: int) -> Tensor:
        """The (N, D) projections of (N, C, s, s) views of a step."""
        if not self.shuffles:
            return self._project(views)
        num_all = len(views) * self.ranks.world_size
        generator = torch.Generator().manual_seed(seed_of(self.seed, SHUFFLING, step))
        order = torch.randperm(num_all, generator=generator).to(views.device)
        own = slice(self.ranks.rank * len(views), (self.ranks.rank + 1) * len(views))
        shuffled = self._project(self.ranks.all_gather_rows(views)[order[own]])
        keys = self.ranks.all_gather_rows(shuffled)
        return keys[order.argsort()[own]]

    def _project(self, views: Tensor) -> Tensor:
        chunks = views.split(self.chunk or len(views))
        return torch.cat([self.average(chunk)[1] for chunk in chunks])

    @torch.no_grad()
    def follow(self, network: nn.Module) -> None:
        """Move the average towards the weights of a network."""
        self.average.update(network)

    def restart(self, network: nn.Module) -> None:
        """Begin the average with the weights of a network."""
        self.average.set(network)


def has_local_statistics(model: nn.Module) -> bool:
    """Whether a layer takes the statistics of the batch of its process alone."""
    # Of which nn.SyncBatchNorm is none.
    local = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return any(isinstance(layer, local) for layer in model.modules())
