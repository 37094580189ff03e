"""Training by several processes: a network whose gradients are averaged, in one order throughout."""

import torch
from torch import Tensor, nn

from network.embedder import Embedder
from run.errors import UserError
from run.processes import Ranks
from run.seeds import random_state, set_random_state


def average_gradients(
    model: Embedder, network: nn.Module, images: Tensor, autocast: torch.autocast, ranks: Ranks
) -> nn.Module:
    """The network, whose gradients are averaged over the ranks, in one order from the start on.

    DDP lays out its buckets anew after its first backward, and sums depend on the layout. Were
    that the first step, a resumed run would add up one step in another order than a run never
    stopped. So the first backward is one of empty images, of which nothing stays. In its forward a
    compiled network is compiled, within DDP's: torch then cuts it where DDP's buckets end, and a bucket
    is sent while the backward goes on.

    Args:
        network: calls the model.
        images: empty ones, as many as a step has.
    """
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random = random_state(images.device)
    network = ranks.parallel(network)
    with autocast:
        network(images)[1].sum().backward()
    if any(weight.grad is None for weight in model.parameters() if weight.requires_grad):
        raise UserError(
            "--model has weights that its embedding does not depend on, which several processes "
            "cannot average: train it in one process"
        )
    model.zero_grad()
    model.load_state_dict(state)
    set_random_state(random, images.device)
    return network
