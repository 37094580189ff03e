"""The optimiser and the learning rate of every step, both from timm."""

from typing import Any

from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from run.config import PretrainConfig

# Of each --optimizer: its name in timm, whose "sgd" would be Nesterov's, and the options that
# are not timm's defaults. RMSprop's eps is that of the SupCon authors' stage 1 (of stage 2: 0.001).
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "momentum": ("momentum", {}),
    "nesterov": ("nesterov", {}),
    "lars": ("lars", {"trust_coeff": 0.001}),
    "rmsprop": ("rmsproptf", {"eps": 1.0}),
    "adamw": ("adamw", {}),
}


def build_optimizer(model: nn.Module, config: PretrainConfig) -> Optimizer:
    """The optimiser that a config asks for, over all parameters.

    They are one group, or two where norm layers, or they and biases, do not decay.
    """
    decays = config.decay_norm_and_bias
    if decays is None:
        decays = config.optimizer != "lars"
    parameters = list(model.parameters())
    biases = _biases(model) if decays == "bias" else set()
    decaying = [p for p in parameters if decays is True or p.ndim > 1 or p in biases]
    others = [p for p in parameters if not (decays is True or p.ndim > 1 or p in biases)]
    groups: list[dict[str, Any]] = [{"params": decaying, "weight_decay": config.weight_decay}]
    if config.optimizer == "lars":
        # Left to itself, timm's adapts nothing where nothing decays.
        groups[0]["always_adapt"] = True
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
    name, options = OPTIMIZERS[config.optimizer]
    return create_optimizer_v2(groups, opt=name, lr=config.learning_rate, momentum=0.9, **options)


def _biases(model: nn.Module) -> set[nn.Parameter]:
    """Those beside a weight of several dimensions: not the ones of norm layers."""
    found = set()
    for module in model.modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(weight, Tensor) and weight.ndim > 1 and isinstance(bias, nn.Parameter):
            found.add(bias)
    return found


def build_schedule(
    optimizer: Optimizer, config: PretrainConfig, steps_per_epoch: int, total_steps: int
) -> Scheduler:
    """Linear warm-up, then what --schedule says; a cosine is at its end after `total_steps`.

    `schedule.step_update(step)` before a step sets its learning rate from `step` alone, so a
    resumed run has no schedule to restore.
    """
    assert config.warmup_epochs is not None
    warmup_steps = min(config.warmup_epochs * steps_per_epoch, total_steps - 1)
    options: dict[str, Any] = {
        "warmup_t": warmup_steps,
        # A warm-up from zero would lose the first step.
        "warmup_lr_init": config.learning_rate / (warmup_steps + 1),
        # Without it the schedule starts part-way down and the rate jumps where warm-up ends.
        "warmup_prefix": True,
        "t_in_epochs": False,
    }
    if config.schedule == "cosine":
        # A single step is at the peak with either length; timm warns of a length of 1.
        length = max(total_steps - warmup_steps, 2)
        return CosineLRScheduler(optimizer, length, lr_min=config.final_learning_rate, **options)
    assert config.decay_epochs
    decay_steps = [epochs * steps_per_epoch for epochs in config.decay_epochs]
    if config.schedule == "exponential":
        factor = config.decay_rate ** (1 / decay_steps[0])
        return StepLRScheduler(optimizer, decay_t=1, decay_rate=factor, **options)
    # timm counts from the end of the warm-up, and lowers the rate one step before a milestone.
    milestones = [round(steps) - warmup_steps + 1 for steps in decay_steps]
    return MultiStepLRScheduler(
        optimizer, decay_t=milestones, decay_rate=config.decay_rate, **options
    )


def load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Give an optimizer the state that another's `state_dict` returned.

    Raises:
        ValueError: it is that of other weights, which torch itself finds out in the next step.
    """
    optimizer.load_state_dict(saved)
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim > 0 and value.shape != weight.shape:
                raise ValueError(
                    f"the optimizer's {name} is {tuple(value.shape)} for a weight of "
                    f"{tuple(weight.shape)}"
                )


def gradient_norm(optimizer: Optimizer) -> Tensor:
    """The norm of all gradients together, a scalar on their device."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return get_total_norm([weight.grad for weight in weights if weight.grad is not None])
