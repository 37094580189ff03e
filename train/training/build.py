"""The trainer that the options ask for: network, views, method, optimiser and schedule, put together."""

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from data.images import ImageData
from data.views import build_views
from evaluation.probe import Probe
from methods.cmc import CMC
from methods.contrastive import Contrastive
from methods.cross_entropy import CrossEntropy
from methods.joint import Joint
from methods.max_margin import MaxMargin
from methods.method import Method, Setup
from methods.moco import MoCo
from methods.momentum_queue import MomentumQueue
from methods.n_pairs import NPairs
from methods.options import MethodOptions
from methods.simclr import SimCLR
from methods.triplet import Triplet
from network.embedder import Embedder, build_model, sync_batch_norms
from run.errors import UserError
from run.options import PretrainOptions
from run.processes import ALONE, Ranks
from run.seeds import seed_of
from training.data_parallel import average_gradients
from training.optimizer import build_optimizer
from training.schedule import build_schedule
from training.trainer import Trainer

# The methods by name.
METHODS: dict[str, Callable[[MethodOptions, Setup], Method]] = {
    "supcon": Contrastive,
    "simclr": SimCLR,
    "moco": MoCo,
    "cross_entropy": CrossEntropy,
    "joint": Joint,
    "n_pairs": NPairs,
    "triplet": Triplet,
    "max_margin": MaxMargin,
    "cmc": CMC,
}
# Tells the seeds of a method's weights from others of the same run.
WEIGHTS_OF_METHOD = 3


def build_trainer(
    options: PretrainOptions,
    data: ImageData,
    *,
    steps_per_epoch: int,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Trainer:
    """A trainer before its first step, of images like those of `data`.

    Args:
        ranks: the processes that train together, each on its share of every batch.
    """
    seed = options.seeds.seed
    model = _build_model(options, data, device, ranks)
    method = build_method(options, model, data, ranks)
    method.check(data)
    model.head.requires_grad_(method.uses_head)
    probe = None
    if options.evaluation.probe:
        probe = Probe(model.num_features, len(data.classes), device, ranks)
    optimizer = build_optimizer(options.optimizer, model, method)
    return Trainer(
        model,
        _network(options, model, method, data, ranks),
        method.to(device),
        build_views(
            options.views,
            data,
            seed=seed,
            ranks=ranks,
            memory_format=options.network.memory_format,
        ),
        optimizer,
        build_schedule(options.schedule, optimizer, steps_per_epoch=steps_per_epoch),
        options.step,
        num_views=options.num_views,
        probe=probe,
        ranks=ranks,
    )


def build_method(
    options: PretrainOptions, model: Embedder, data: ImageData, ranks: Ranks = ALONE
) -> Method:
    """The method that the options ask for, to train a model on its device."""
    setup = Setup(
        model=model,
        data=data,
        network=options.network,
        num_views=options.num_views,
        batch_size=options.batches.batch_size,
        chunk=options.step.grad_cache_chunk,
        compiled=options.step.compile,
        seed=options.seeds.seed,
        ranks=ranks,
    )
    name = options.method.method
    with_queue = name == "supcon" and options.method.num_keys is not None
    # Its weights are the same for all processes, and what the network draws is as without them.
    with torch.random.fork_rng(devices=[]):
        # Of the CPU alone: torch.manual_seed would seed a GPU's generator alike in all processes.
        torch.default_generator.manual_seed(seed_of(options.seeds.seed, WEIGHTS_OF_METHOD))
        return (MomentumQueue if with_queue else METHODS[name])(options.method, setup)


def _build_model(
    options: PretrainOptions, data: ImageData, device: torch.device, ranks: Ranks
) -> Embedder:
    seed = options.seeds.seed
    if options.step.sync_batchnorm and device.type != "cuda":
        raise UserError(f"--sync_batchnorm needs --device cuda, and this is {device.type}")
    torch.manual_seed(seed)
    model = build_model(options.network, channels=data.channels, image_size=data.image_size)
    if ranks.seed_key:
        # The weights are the same; what the network draws itself is not.
        torch.manual_seed(seed_of(seed, *ranks.seed_key))
    if options.step.sync_batchnorm:
        model = sync_batch_norms(model)
    return model.to(device)


def _network(
    options: PretrainOptions, model: Embedder, method: Method, data: ImageData, ranks: Ranks
) -> nn.Module:
    """The model as training calls it: compiled, or averaging gradients over the ranks."""
    # For training alone, whose batches have one size: evaluation stays as exact as without, and
    # what it sees cannot lead to another program for training. The names of the weights are the
    # model's own.
    network: nn.Module = model
    if options.step.compile:
        network = cast(nn.Module, torch.compile(model, dynamic=False))
    if ranks.group is None:
        return network
    device = next(model.parameters()).device
    num_views = method.num_embedded or options.num_views
    num_rows = num_views * options.batches.batch_size // ranks.world_size
    num_rows = min(num_rows, options.step.grad_cache_chunk or num_rows)
    shape = (num_rows, data.channels, data.image_size, data.image_size)
    images = torch.zeros(shape, device=device)
    images = images.contiguous(memory_format=options.network.memory_format)
    return average_gradients(model, network, images, options.step.autocast(device), ranks)
