"""One step of training: random views of a batch, their loss, and the weights that follow."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from data.images import ImageData
from data.prefetch import on_device
from data.views import build_views
from evaluation.probe import Probe
from network.embedder import Embedder, build_model, sync_batch_norms
from network.momentum_queue import MomentumQueue
from run.clock import PhaseClock
from run.config import PretrainConfig
from run.errors import UserError
from run.out_of_memory import memory_for
from run.processes import ALONE, Ranks
from run.seeds import random_state, seed_of, set_random_state
from supcon_kernels import grad_cache_backward, supcon_loss
from training.optimizer import build_optimizer, build_schedule, gradient_norm, load_optimizer

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """A network, the random views that it sees, and how its weights move.

    Args:
        config: what to build, and how to train it.
        data: what the images are like.
        steps_per_epoch: of the learning rate's schedule, as total_steps.
        device: where everything is.
        ranks: the processes that train together, each on its share of every batch.
    """

    def __init__(
        self,
        config: PretrainConfig,
        data: ImageData,
        *,
        steps_per_epoch: int,
        total_steps: int,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        if config.sync_batchnorm and device.type != "cuda":
            raise UserError(f"--sync_batchnorm needs --device cuda, and this is {device.type}")
        config = replace(config, image_size=data.image_size)
        torch.manual_seed(config.seed)
        model = build_model(config, channels=data.channels)
        if ranks.seed_key:
            # The weights are the same; what the network draws itself is not.
            torch.manual_seed(seed_of(config.seed, *ranks.seed_key))
        if config.sync_batchnorm:
            model = sync_batch_norms(model)
        self.model = model.to(device).to(memory_format=config.memory_format)
        # For training alone, whose batches have one size: evaluation stays as exact as without, and
        # what it sees cannot lead to another program for training. The names of the weights are the
        # model's own.
        network = torch.compile(self.model, dynamic=False) if config.compile else self.model
        self.device, self.ranks, self.config = device, ranks, config
        self.network = self._parallel(network, data)
        self.views = build_views(config, data, ranks)
        self.optimizer = build_optimizer(self.model, config)
        self.schedule = build_schedule(self.optimizer, config, steps_per_epoch, total_steps)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.average: ModelEmaV3 | None = None
        if config.ema_decay is not None:
            self.average = ModelEmaV3(self.model, decay=config.ema_decay, use_warmup=True)
        with memory_for(config, "queue_size"):
            self.momentum_queue = (
                None if config.queue_size is None else MomentumQueue(self.model, config, ranks)
            )
        self.probe: Probe | None = None
        if config.probe:
            self.probe = Probe(self.model.num_features, len(data.classes), device, ranks)
        # Of the last step, before it was clipped: a scalar on the device.
        self.gradient_norm = torch.zeros((), device=device)
        self.clock = PhaseClock(device)

    def _parallel(self, network: nn.Module, data: ImageData) -> nn.Module:
        """The network, whose gradients are averaged over the ranks, in one order from the start on.

        DDP lays out its buckets anew after its first backward, and sums depend on the layout. Were
        that the first step, a resumed run would add up one step in another order than a run never
        stopped. So the first backward is one of empty images, of which nothing stays.
        """
        if self.ranks.group is None:
            return network
        config = self.config
        num_views = config.num_views if config.queue_size is None else 1
        num_rows = num_views * config.batch_size // self.ranks.world_size
        num_rows = min(num_rows, config.grad_cache_chunk or num_rows)
        shape = (num_rows, data.channels, data.image_size, data.image_size)
        images = torch.zeros(shape, device=self.device)
        images = images.contiguous(memory_format=config.memory_format)
        state = {key: value.clone() for key, value in self.model.state_dict().items()}
        random = random_state(self.device)
        network = self.ranks.parallel(network)
        with self._autocast():
            network(images)[1].sum().backward()
        if any(weight.grad is None for weight in self.model.parameters() if weight.requires_grad):
            raise UserError(
                f"--model {config.model} has weights that its embedding does not depend on, which "
                "several processes cannot average: train it in one process"
            )
        self.model.zero_grad()
        self.model.load_state_dict(state)
        set_random_state(random, self.device)
        return network

    @property
    def measured(self) -> Embedder:
        """What is evaluated and exported: the average of the weights where there is one."""
        if self.average is None:
            return self.model
        average: Embedder = self.average.module
        return average

    def restart_averages(self) -> None:
        """Begin every average of the weights with them as they are."""
        if self.average is not None:
            self.average.set(self.model)
        if self.momentum_queue is not None:
            self.momentum_queue.average.set(self.model)

    def step(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        """Train on one batch, the next after `step` others.

        Args:
            images: (B, C, S, S) uint8, on any device.
            labels: (B,), on any device.
            step: chooses the views and the learning rate.

        Returns:
            The loss, a scalar on the device of the network, from before the weights moved. Under
            fp16 they stay where a gradient is not finite; the gradients are left unscaled.
        """
        self.schedule.step_update(step)
        images, labels = (on_device(part, self.device) for part in (images, labels))
        self.clock.mark("data")
        self.optimizer.zero_grad()
        if self.config.grad_cache_chunk is None:
            loss = self.loss(images, labels, step)
            self.scaler.scale(loss).backward()
        else:
            loss = self.chunked_backward(images, labels, step, self.config.grad_cache_chunk)
        self.clock.mark("backward")
        self.scaler.unscale_(self.optimizer)
        if self.config.clip_grad is None:
            self.gradient_norm = gradient_norm(self.optimizer)
        else:
            self.gradient_norm = nn.utils.clip_grad_norm_(
                self.model.parameters(), self.config.clip_grad
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.model, step=step + 1)
        if self.momentum_queue is not None:
            self.momentum_queue.average.update(self.model)
        self.clock.mark("optimizer")
        # Without a queue it is that of the rows of all.
        return loss.detach() if self.momentum_queue is None else self.ranks.mean(loss.detach())

    def loss(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        """The loss of a batch on the device: (B, C, S, S) uint8 images in random views.

        A memory takes the keys of the batch in, and a probe learns from its embeddings.
        """
        views, loss_of = self._prepare(images, labels, step)
        return loss_of(*self._encode(views))

    def chunked_backward(self, images: Tensor, labels: Tensor, step: int, num_rows: int) -> Tensor:
        """`loss` and its backward, where the network holds the activations of `num_rows` views.

        The time of its second forward is counted as "backward".
        """
        views, loss_of = self._prepare(images, labels, step)
        embedded = []

        def encode(chunk: Tensor) -> Tensor:
            of_chunk, rows = self._encode(chunk)
            if not torch.is_grad_enabled():  # the first of two times
                embedded.append(of_chunk)
            return rows

        return grad_cache_backward(
            encode,
            views.split(num_rows),
            lambda rows: loss_of(torch.cat(embedded), rows),
            model=self.network,
            scale=self.scaler.scale,
        )

    def _prepare(
        self, images: Tensor, labels: Tensor, step: int
    ) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
        """The views that the network is to embed, and the loss of (embeddings, projections)."""
        num_views = self.config.num_views
        seen = [self.views.random(images, step=step, view=view) for view in range(num_views)]
        classes = labels
        if self.config.method == "simclr":
            # Each image its own class, which no other has, be it of another step in a queue.
            share = step * self.ranks.world_size + self.ranks.rank
            classes = torch.arange(len(labels), device=self.device) + share * len(labels)
        # What a queue holds is the same for all processes; their rows are their own.
        group, contrast = self.ranks.group, {}
        if self.momentum_queue is not None:
            with self._autocast():
                self.momentum_queue.remember(torch.cat(seen[1:]), classes)
            group, contrast, seen = "local", self.momentum_queue.contrast(), seen[:1]

        def loss_of(embedded: Tensor, rows: Tensor) -> Tensor:
            if self.probe is not None:
                self.probe.step(embedded, labels)
            features = rows.float().unflatten(0, (-1, len(images))).transpose(0, 1)
            self.clock.mark("forward")
            loss = supcon_loss(
                features,
                classes,
                temperature=self.config.temperature,
                base_temperature=self.config.base_temperature,
                group=group,
                **contrast,
            )
            self.clock.mark("loss")
            return loss

        return torch.cat(seen), loss_of

    def _encode(self, views: Tensor) -> tuple[Tensor, Tensor]:
        with self._autocast():
            embedded, rows = self.network(views)
        return embedded, rows

    def _autocast(self) -> torch.autocast:
        dtype = AUTOCAST.get(self.config.precision)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def copy_statistics(self) -> None:
        """Have every process evaluate by the first one's running statistics."""
        for module in (self.model, self.measured, self.probe and self.probe.classifier):
            if module is not None:
                self.ranks.broadcast(module.buffers())

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.average is None else self.average.module.state_dict(),
            "memory": None if self.momentum_queue is None else self.momentum_queue.state_dict(),
            "probe": None if self.probe is None else self.probe.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.model.load_state_dict(saved["model"])
        load_optimizer(self.optimizer, saved["optimizer"])
        self.scaler.load_state_dict(saved.get("scaler", {}))
        if self.average is not None:
            self.average.module.load_state_dict(saved["ema"])
        if self.momentum_queue is not None:
            self.momentum_queue.load_state_dict(saved["memory"])
        if self.probe is not None:
            self.probe.load_state_dict(saved["probe"])
