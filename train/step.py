"""One step of training: random views of a batch, their loss, and the weights that follow."""

from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from augment import build_views
from clock import PhaseClock
from config import PretrainConfig
from data import ImageData
from memory import Memory
from model import Embedder, build_model
from optim import build_optimizer, build_schedule
from probe import Probe
from supcon_kernels import supcon_loss

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """A network, the random views that it sees, and how its weights move.

    Args:
        config: what to build, and how to train it.
        data: what the images are like.
        steps_per_epoch: of the learning rate's schedule, as total_steps.
        device: where everything is.
    """

    def __init__(
        self,
        config: PretrainConfig,
        data: ImageData,
        *,
        steps_per_epoch: int,
        total_steps: int,
        device: torch.device,
    ) -> None:
        torch.manual_seed(config.seed)
        model = build_model(config, channels=data.channels)
        self.model = model.to(device).to(memory_format=config.memory_format)
        # For training alone, whose batches have one size: evaluation stays as exact as without, and
        # what it sees cannot lead to another program for training. The names of the weights are the
        # model's own.
        self.network = torch.compile(self.model, dynamic=False) if config.compile else self.model
        self.views = build_views(config, data)
        self.optimizer = build_optimizer(self.model, config)
        self.schedule = build_schedule(self.optimizer, config, steps_per_epoch, total_steps)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.average: ModelEmaV3 | None = None
        if config.ema_decay is not None:
            self.average = ModelEmaV3(self.model, decay=config.ema_decay, use_warmup=True)
        self.memory = None if config.queue_size is None else Memory(self.model, config)
        self.probe: Probe | None = None
        if config.probe:
            self.probe = Probe(self.model.encoder.num_features, len(data.classes), device)
        self.clock = PhaseClock(device)
        self.device = device
        self.config = config

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
        if self.memory is not None:
            self.memory.average.set(self.model)

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
        images, labels = images.to(self.device), labels.to(self.device)
        self.clock.mark("data")
        loss = self.loss(images, labels, step)
        self.clock.mark("loss")
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.clock.mark("backward")
        self.scaler.unscale_(self.optimizer)
        if self.config.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.model, step=step + 1)
        if self.memory is not None:
            self.memory.average.update(self.model)
        self.clock.mark("optimizer")
        return loss.detach()

    def loss(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        """The loss of a batch on the device: (B, C, S, S) uint8 images in random views.

        A memory takes the keys of the batch in, and a probe learns from its embeddings.
        """
        num_views = self.config.num_views
        seen = [self.views.random(images, step=step, view=view) for view in range(num_views)]
        classes = labels
        if self.config.method == "simclr":
            # Each image its own class, which no other has, be it of another step in a queue.
            classes = torch.arange(len(labels), device=self.device) + step * len(labels)
        dtype = AUTOCAST.get(self.config.precision)
        contrast: dict[str, Tensor] = {}
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            if self.memory is None:
                embedded, rows = self.network(torch.cat(seen))
            else:
                embedded, rows = self.network(seen[0])
                self.memory.remember(torch.cat(seen[1:]), classes)
                contrast = self.memory.contrast()
        if self.probe is not None:
            self.probe.step(embedded, labels)
        features = rows.float().unflatten(0, (-1, len(images))).transpose(0, 1)
        self.clock.mark("forward")
        return supcon_loss(features, classes, temperature=self.config.temperature, **contrast)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.average is None else self.average.module.state_dict(),
            "memory": None if self.memory is None else self.memory.state_dict(),
            "probe": None if self.probe is None else self.probe.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved.get("scaler", {}))
        if self.average is not None:
            self.average.module.load_state_dict(saved["ema"])
        if self.memory is not None:
            self.memory.load_state_dict(saved["memory"])
        if self.probe is not None:
            self.probe.load_state_dict(saved["probe"])
