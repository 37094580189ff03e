"""A compiled network of several processes: gradients are sent while the rest is still computed."""

from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import train_fixtures  # noqa: F401  puts train/ on the path
from run.processes import Ranks
from train_parts import load_data, options_of, trainer_of

BATCH_SIZE = 16


@pytest.fixture
def ranks():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(group=dist.group.WORLD)
    dist.destroy_process_group()


def test_gradients_are_sent_before_the_compiled_backward_ends(ranks):
    events = []

    def logged(kind):
        def compiler(graph, inputs):
            def run(*arguments):
                events.append(kind)
                return graph(*arguments)

            return make_boxed_func(run)

        return compiler

    # Without the minutes of a C++ compiler.
    backend = aot_autograd(fw_compiler=logged("forward"), bw_compiler=logged("backward"))

    def send(group, bucket):
        events.append("send")
        return allreduce_hook(group, bucket)

    def parallel(network, **options):
        # Of 1.4 MB of weights, the least that torch cuts into two.
        network = DistributedDataParallel(network, bucket_cap_mb=1, **options)
        network.register_comm_hook(ranks.group, send)
        return network

    options = options_of(
        model="resnet10",
        width=16,
        image_size=8,
        batch_size=BATCH_SIZE,
        warmup_epochs=0,
        compile=True,
    )
    data = load_data(options)
    images, labels = data.train[list(range(BATCH_SIZE))]
    with (
        patch("torch.compile", partial(torch.compile, backend=backend)),
        patch("torch.nn.parallel.DistributedDataParallel", parallel),
    ):
        trainer = trainer_of(options, data, ranks=ranks)
        for step in range(2):
            events.clear()
            trainer.step(images, labels, step)
            # From the first step on, so that a resumed run adds up in the same order.
            assert events == ["forward", "forward", "backward", "send", "backward", "send"]
