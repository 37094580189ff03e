"""One step of training: random views of a batch, their loss, and the weights that follow."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from data.prefetch import on_device
from data.views import Views
from evaluation.probe import Probe
from methods.method import Method
from network.embedder import Embedder
from run.clock import PhaseClock
from run.processes import ALONE, Ranks
from run.rules import broken, out_of_range
from supcon_kernels import grad_cache_backward
from training.optimizer import gradient_norm, load_optimizer

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class StepOptions:
    """How a step is computed.

    Args:
        clip_grad: Largest norm of the gradient of all parameters together. Default: no clipping.
        ema_decay: Decay of an exponential moving average of the weights, such as 0.999. The average
            is evaluated and exported. At step k the decay is at most 1 - k^(-2/3). Default: no
            average.
        precision: Precision of the network in training. bf16 and fp16 use autocast. fp16 scales
            gradients, and skips steps that overflow. The loss is always computed in float32.
        compile: Compile the network for training (torch.compile). Checkpoints are the same.
        grad_cache_chunk: Gradient caching, for batches that do not fit in memory: rows per chunk. A
            row is one view of one image; each process counts its own. The batch is encoded twice,
            and the gradient is that of the whole batch. Batch norm uses the statistics of each
            chunk. Default: no chunks.
        sync_batchnorm: Share the statistics of batch norm among all processes (CUDA only). Without
            it each process has its own; those of rank 0 are evaluated and saved.
    """

    clip_grad: float | None = None
    ema_decay: float | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    grad_cache_chunk: int | None = None
    sync_batchnorm: bool = False

    def mistakes(self) -> list[str]:
        """What is out of range or contradicts itself, one sentence each."""
        rules = [
            (
                not (self.sync_batchnorm and self.compile),
                "--sync_batchnorm contradicts --compile: torch.compile breaks the network at each "
                "of its exchanges; choose one",
            )
        ]
        return broken(rules) + out_of_range(
            self,
            at_least={"grad_cache_chunk": 1},
            greater_than_0=("clip_grad",),
            between_0_and_1=("ema_decay",),
        )

    def autocast(self, device: torch.device) -> torch.autocast:
        """While entered, networks on the device compute in this precision."""
        dtype = AUTOCAST.get(self.precision)
        return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


@dataclass(eq=False)
class Trainer:
    """A network, the random views that it sees, a loss, and how its weights move.

    Args:
        model: what is trained, on the device of the run.
        network: the model as training calls it: compiled, or averaging gradients over the ranks.
        num_views: of each image in a batch.
        probe: learns from the embeddings of each step.
        ranks: the processes that train together, each on its share of every batch.
    """

    model: Embedder
    network: nn.Module
    method: Method
    views: Views
    optimizer: Optimizer
    schedule: Scheduler
    options: StepOptions
    num_views: int = 2
    probe: Probe | None = None
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        of_method = [weight for weight in self.method.parameters() if weight.requires_grad]
        self.parameters_of_method = of_method
        self.trained = [*self.model.parameters(), *of_method]
        fp16 = self.options.precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self.average: ModelEmaV3 | None = None
        if self.options.ema_decay is not None:
            self.average = ModelEmaV3(self.model, decay=self.options.ema_decay, use_warmup=True)
        # Of the last step, before it was clipped: a scalar on the device.
        self.gradient_norm = torch.zeros((), device=self.device)
        self.clock = PhaseClock(self.device)

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

        # Views, of which the network embeds all or the first.
        views = [self.views.random(images, step=step, view=view) for view in range(self.num_views)]
        self.clock.mark("views")
        targets = self.method.targets(labels, step)
        with self.options.autocast(self.device):
            self.method.prepare(views, targets, step)
        rows = torch.cat(views[: self.method.num_embedded])

        # Embeddings, their loss and its gradient.
        self.optimizer.zero_grad()
        if self.options.grad_cache_chunk is None:
            embedded, projected = self._encode(rows)
            loss = self.loss(embedded, projected, targets)
            self.scaler.scale(loss).backward()
        else:
            chunks = rows.split(self.options.grad_cache_chunk)
            embedded, loss = self._backward_by_chunks(chunks, targets)
        self.clock.mark("backward")
        if self.probe is not None:
            self.probe.step(embedded, labels)

        # New weights, and their averages.
        for weight in self.parameters_of_method:
            if weight.grad is not None:  # those of the network are averaged in its backward
                weight.grad = self.ranks.mean(weight.grad)
        self.scaler.unscale_(self.optimizer)
        if self.options.clip_grad is None:
            self.gradient_norm = gradient_norm(self.optimizer)
        else:
            self.gradient_norm = nn.utils.clip_grad_norm_(self.trained, self.options.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.model, step=step + 1)
        self.method.follow(self.model)
        self.clock.mark("optimizer")
        return loss.detach() if self.method.of_all_ranks else self.ranks.mean(loss.detach())

    def loss(self, embedded: Tensor, projected: Tensor, targets: Tensor) -> Tensor:
        """The loss of what the network made of a batch."""
        self.clock.mark("forward")
        loss: Tensor = self.method(embedded, projected, targets)
        self.clock.mark("loss")
        return loss

    def _encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        with self.options.autocast(self.device):
            embedded, projected = self.network(rows)
        return embedded, projected

    def _backward_by_chunks(
        self, chunks: tuple[Tensor, ...], targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The embeddings of some chunks of rows, without a graph, and the loss, whose gradient is left.

        The network holds the activations of one chunk. The time of its second forward is counted as
        "backward".
        """
        embedded = torch.empty(0)

        def loss_of(rows: Tensor) -> Tensor:
            nonlocal embedded
            embedded, projected = rows.tensor_split([self.model.num_features], dim=1)
            return self.loss(embedded, projected, targets)

        loss = grad_cache_backward(
            lambda chunk: torch.cat(self._encode(chunk), dim=1),
            chunks,
            loss_of,
            model=self.network,
            scale=self.scaler.scale,
        )
        return embedded.detach(), loss

    @property
    def measured(self) -> Embedder:
        """What is evaluated and exported: the average of the weights where there is one."""
        if self.average is None:
            return self.model
        average: Embedder = self.average.module
        return average

    @property
    def learning_rate(self) -> float:
        """Of the last step."""
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    def restart_averages(self) -> None:
        """Begin every average of the weights with them as they are."""
        if self.average is not None:
            self.average.set(self.model)
        self.method.restart(self.model)

    def broadcast_statistics(self) -> None:
        """Have every process evaluate by the running statistics of rank 0."""
        modules: list[nn.Module] = [self.model, self.measured]
        if self.probe is not None:
            modules.append(self.probe.classifier)
        for module in modules:
            self.ranks.broadcast(module.buffers())

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {
            "model": self.model.state_dict(),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.average is None else self.average.module.state_dict(),
            "probe": None if self.probe is None else self.probe.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Resume from what `state_dict` gave."""
        self.model.load_state_dict(saved["model"])
        self.method.load_state_dict(_method_state(saved))
        load_optimizer(self.optimizer, saved["optimizer"])
        self.scaler.load_state_dict(saved.get("scaler", {}))
        if self.average is not None:
            self.average.module.load_state_dict(saved["ema"])
        if self.probe is not None:
            self.probe.load_state_dict(saved["probe"])


def _method_state(saved: dict[str, Any]) -> dict[str, Any]:
    if "method" in saved:
        state: dict[str, Any] = saved["method"]
        return state
    # Of an older checkpoint: a queue and its momentum encoder, if any.
    memory = saved.get("memory") or {}
    return {f"encoder.{key}" if key.startswith("average.") else key: memory[key] for key in memory}
