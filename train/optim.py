"""The optimiser and the learning rate of every step, both from timm."""

from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import Optimizer

from config import PretrainConfig


def build_optimizer(model: nn.Module, config: PretrainConfig) -> Optimizer:
    """SGD with momentum 0.9, not Nesterov (timm's "sgd" would be), decaying all parameters."""
    return create_optimizer_v2(
        model,
        opt="momentum",
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        momentum=0.9,
        filter_bias_and_bn=False,
    )


def build_schedule(
    optimizer: Optimizer, config: PretrainConfig, steps_per_epoch: int, total_steps: int
) -> CosineLRScheduler:
    """Linear warm-up, then half a cosine to zero at `total_steps`.

    `schedule.step_update(step)` before a step sets its learning rate from `step` alone, so a
    resumed run has no schedule to restore.
    """
    warmup_steps = min(config.warmup_epochs * steps_per_epoch, total_steps - 1)
    return CosineLRScheduler(
        optimizer,
        # A single step is at the peak with either length; timm warns of a length of 1.
        t_initial=max(total_steps - warmup_steps, 2),
        warmup_t=warmup_steps,
        # A warm-up from zero would lose the first step.
        warmup_lr_init=config.learning_rate / (warmup_steps + 1),
        # Without it the cosine starts part-way down and the rate jumps where warm-up ends.
        warmup_prefix=True,
        t_in_epochs=False,
    )
