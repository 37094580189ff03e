"""Where the host would wait for a GPU: nowhere in a step, counted on tensors that pretend to be on one."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import train_fixtures  # noqa: F401  puts train/ on the path
from pretend_cuda import PretendCuda, pretend_cuda
from run.checkpoint import RunState
from run.clock import PhaseClock
from run.errors import UserError
from run.options import PretrainOptions
from run.records import STEPS_PER_FLUSH, Report
from supcon_kernels import LabelQueue, supcon_loss
from train_parts import build_views, load_data, options_of
from training.build import build_trainer
from training.divergence import DivergenceCheck

BATCH_SIZE = 32
CUDA = torch.device("cuda")
OPTIONS: dict[str, dict[str, Any]] = {
    "crop_flip": {"augment": "crop_flip", "clip_grad": 1.0},
    "digits": {"augment": "digits", "optimizer": "lars"},
    "grey": {"augment": "simclr", "in_chans": 1},
    "simclr": {"augment": "simclr", "probe": True, "ema_decay": 0.9},
    "simclr_blur": {"augment": "simclr_blur", "grad_cache_chunk": 24},
    "autoaugment": {"augment": "autoaugment", "precision": "bf16"},
    "randaugment": {"augment": "randaugment", "queue_size": 64},
    "stacked_randaugment": {"augment": "stacked_randaugment", "method": "simclr"},
    "fp16": {"augment": "crop_flip", "precision": "fp16"},
    "joint": {"augment": "crop_flip", "method": "joint", "learn_temperature": True},
    "moco": {"augment": "crop_flip", "method": "moco", "queue_size": 64},
    "cross_entropy": {"augment": "crop_flip", "method": "cross_entropy", "label_smoothing": 0.1},
    "cmc": {"augment": "crop_flip", "method": "cmc", "in_chans": 1, "precision": "bf16"},
}


def small(options: dict[str, Any]) -> PretrainOptions:
    flat = {"in_chans": 3, "model": "resnet10", "width": 4, "image_size": 16, "warmup_epochs": 0}
    return options_of(**{**flat, "batch_size": BATCH_SIZE, "device": "cuda", **options})


@pytest.mark.parametrize("name", OPTIONS)
def test_host_waits_in_no_step(name):
    options = small(OPTIONS[name])
    data = load_data(options)
    images, labels = data.train[list(range(BATCH_SIZE))]
    with pretend_cuda() as device:
        trainer = build_trainer(options, data, steps_per_epoch=9, device=CUDA)
        losses = []
        for step in range(3):
            device.reset()
            losses.append(trainer.step(images, labels, step))
        waits = dict(device.waits)
        assert torch.stack(losses).isfinite().all()
    if options.step.precision == "fp16":  # whose scaler asks whether to skip the step
        assert [place for place in waits if "amp/grad_scaler.py" in place] == list(waits)
        assert sum(waits.values()) == 1
    else:
        assert waits == {}


@pytest.mark.parametrize("name", ["autoaugment", "randaugment"])
def test_policies_take_few_operations_whatever_the_batch(name):
    options = small({"augment": name})
    views = build_views(options, load_data(options))
    with pretend_cuda() as device:
        images = torch.rand(512, 3, 8, 8).to(CUDA)
        device.reset()
        views.pipeline[-1](images)
        assert device.kernels < 250 and device.waits == {}


def test_records_are_read_every_few_steps_and_before_a_checkpoint(tmp_path, capsys):
    with pretend_cuda() as device:
        loss = torch.zeros(()).to(CUDA)
        state = RunState(raw_pixels=0.0, untrained=0.0, accuracy=0.0)
        with Report(
            tmp_path,
            None,
            options_of(batch_size=BATCH_SIZE),
            total_steps=STEPS_PER_FLUSH,
            divergence=DivergenceCheck(None, scale=1.0),
            phases=PhaseClock(CUDA),
        ) as report:
            device.reset()
            for _ in range(STEPS_PER_FLUSH - 1):
                state.step += 1
                report.step(state, 0.1, loss, loss)
            assert sum(device.waits.values()) == 0
            state.step += 1
            report.step(state, 0.1, loss, loss)
            assert sum(device.waits.values()) == 1
            assert "GPU 1.5 of 80.0 GiB" in capsys.readouterr().out
            report.step(state, 0.1, loss * torch.inf, loss)
            with pytest.raises(UserError, match="the loss is nan"):
                report.sync(state)


def waits_of(device: PretendCuda, act: Any) -> int:
    device.reset()
    act()
    return sum(device.waits.values())


def test_what_waits_is_counted():
    with pretend_cuda() as device:
        x = torch.zeros(3).to(CUDA)
        pinned = torch.zeros(3).pin_memory()
        assert (
            x.device == torch.device("cuda", 0)
            and x.is_cuda
            and torch.zeros(2, device="cuda").is_cuda
        )
        for act in (
            lambda: x.sum().item(),
            lambda: x.cpu(),
            lambda: x.tolist(),
            lambda: x.nonzero(),
            lambda: x[x > 0],
            lambda: x[torch.tensor([1])],
            lambda: torch.zeros(3).to(CUDA),
            lambda: torch.tensor([1.0], device=CUDA),
            lambda: torch.zeros(3).copy_(x, non_blocking=True),
            lambda: bool(x.any()),
        ):
            assert waits_of(device, act) == 1
        for act in (
            lambda: torch.zeros(3).to(CUDA, non_blocking=True),
            lambda: pinned.copy_(x, non_blocking=True),
            lambda: x.masked_fill_(x > 0, 1),
            lambda: (x + 1).mean(),
        ):
            assert waits_of(device, act) == 0
        with pytest.raises(RuntimeError, match="tensors on cuda:0 and cpu"):
            x + torch.zeros(3)


@pytest.fixture
def group():
    """A group of this process alone, with a half for each kind of memory as beside NCCL."""
    store = dist.HashStore()
    dist.init_process_group("cpu:gloo,cuda:gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_sizes_of_ranks_are_agreed_on_without_the_device(group):
    with pretend_cuda() as device:
        features = F.normalize(torch.randn(8, 2, 16), dim=2).to(CUDA).requires_grad_()
        labels = (torch.arange(8) % 3).to(CUDA)
        queue = LabelQueue(32, 16, device=CUDA)

        def step():
            contrast = {"contrast_features": queue.features, "contrast_labels": queue.labels}
            supcon_loss(features, labels, group=group, **contrast).backward()
            queue.enqueue(features[:, 0], labels, group=group)

        step()
        assert waits_of(device, step) == 0, device.waits
        assert features.grad.isfinite().all()
