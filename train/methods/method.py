"""What every method is: an object whose forward is the loss of embeddings and labels.

A new one is a file beside this, and a line in training/build.py; its options stand in options.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.images import ImageData
from network.embedder import Embedder, NetworkOptions
from run.errors import UserError
from run.processes import ALONE, Ranks


@dataclass
class Setup:
    """What a method is built for.

    Args:
        model: what it trains, on the device of the run.
        data: like that which it learns from.
        network: the options that the model was built by.
        num_views: of each image in a batch.
        batch_size: the images of a step, of all processes together.
        chunk: so many views are embedded at a time; None: all.
        compiled: whether networks are compiled for training.
        seed: of the run.
        ranks: the processes that train together.
    """

    model: Embedder
    data: ImageData
    network: NetworkOptions
    num_views: int
    batch_size: int
    chunk: int | None = None
    compiled: bool = False
    seed: int = 0
    ranks: Ranks = ALONE


class Method(nn.Module):
    """A loss that a run can train with.

    Parameters of it that require a gradient are trained with the network's, and its state_dict is
    part of a checkpoint. They are drawn alike by every process. Below, B images are seen in V views
    each.
    """

    # Whether it looks at the labels.
    uses_labels = True
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

    def __init__(self) -> None:
        super().__init__()
        # From (B, F) embeddings to (B, C) scores of the classes, where the method trains one.
        self.classifier: nn.Module | None = None

    def check(self, data: ImageData) -> None:
        """Refuse, or warn of, images and labels of which it cannot learn.

        Raises:
            UserError: it goes by labels, and there is one class.
        """
        present = data.train.labels.unique().tolist()
        if self.uses_labels and len(present) < 2:
            raise UserError(
                f"{data.name} has one class alone, {data.classes[present[0]]!r}: nothing to tell "
                "apart (--method simclr trains without labels)"
            )

    def targets(self, labels: Tensor, step: int) -> Tensor:
        """What the loss goes by in place of the (B,) labels of a step's images."""
        return labels

    @torch.no_grad()
    def prepare(self, views: list[Tensor], targets: Tensor, step: int) -> None:
        """Called before the network embeds the first views of a step, with V times (B, C, s, s)."""

    def forward(self, embedded: Tensor, projected: Tensor, targets: Tensor) -> Tensor:
        """The loss of (V·B, F) embeddings and (V·B, D) projections, view by view, a float32 scalar."""
        raise NotImplementedError

    def figures(self) -> dict[str, float]:
        """Numbers that it has learned, by name, for results.json."""
        return {}

    @torch.no_grad()
    def follow(self, network: nn.Module) -> None:
        """Called when a step has moved the weights of the network."""

    def restart(self, network: nn.Module) -> None:
        """Called when the network has got the weights that a run starts from."""
