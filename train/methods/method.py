"""What every method is: an object whose forward is the loss of embeddings and labels.

A new one is a file beside this, and a line in training/build.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from data.images import ImageData


class Method(nn.Module):
    """A loss that a run can train with.

    Parameters of it that require a gradient are trained with the network's, and its state_dict is
    part of a checkpoint. Below, B images are seen in V views each.
    """

    # So many views of an image does the network embed with gradient; None: all of them.
    num_embedded: int | None = None
    # Whether the loss depends on the projections: without it the head is not trained.
    uses_head = True
    # Whether every process computes the loss of the rows of all, and not of its own.
    of_all_ranks = False
    # The loss of a network that embeds every image alike, or None where that is no number.
    collapsed_loss: float | None = None
    # What this loss is multiplied by.
    scale = 1.0
    # In what its steps differ from those of earlier versions, which a checkpoint holds.
    traits: Sequence[str] = ()

    def check(self, data: ImageData) -> None:
        """Refuse, or warn of, images and labels of which it cannot learn."""

    def targets(self, labels: Tensor, step: int) -> Tensor:
        """What the loss goes by in place of the (B,) labels of a step's images."""
        return labels

    @torch.no_grad()
    def prepare(self, views: list[Tensor], targets: Tensor, step: int) -> None:
        """Called before the network embeds the first views of a step, with V times (B, C, s, s)."""

    def forward(self, embedded: Tensor, projected: Tensor, targets: Tensor) -> Tensor:
        """The loss of (V·B, F) embeddings and (V·B, D) projections, view by view, a float32 scalar."""
        raise NotImplementedError

    @torch.no_grad()
    def follow(self, network: nn.Module) -> None:
        """Called when a step has moved the weights of the network."""

    def restart(self, network: nn.Module) -> None:
        """Called when the network has got the weights that a run starts from."""
