"""The learning rate of every step, and how many steps there are."""

from dataclasses import dataclass
from typing import Any, Literal

from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from run.rules import LARGEST, broken, out_of_range

WARMUP_EPOCHS = 4


@dataclass
class ScheduleOptions:
    """The length of the run, and its learning rate.

    Args:
        epochs: Passes over the training images. Those that do not fill the last batch of a pass are
            left out of it.
        max_steps: Stop after this number of steps. The learning rate reaches its end there, if the
            warm-up is shorter; otherwise it ends at its peak.
        warmup_epochs: Epochs of linear warm-up. Default: 4, but at most epochs - 1 and the first of
            decay_epochs.
        schedule: cosine: to final_learning_rate. step: times decay_rate after each of decay_epochs.
            exponential: a little every step, times decay_rate per decay_epochs.
        final_learning_rate: Last learning rate of the cosine. SupContrast: 0.001 of the peak.
        decay_rate: Factor of the learning rate (step and exponential only).
        decay_epochs: step: epochs after which the learning rate falls, such as [700,800,900].
            exponential: epochs per factor decay_rate, such as [10].
    """

    epochs: int = 60
    max_steps: int | None = None
    warmup_epochs: int | None = None
    schedule: Literal["cosine", "step", "exponential"] = "cosine"
    final_learning_rate: float = 0.0
    decay_rate: float = 0.1
    decay_epochs: list[float] | None = None

    def __post_init__(self) -> None:
        if self.warmup_epochs is None:
            self.warmup_epochs = self.default_warmup_epochs

    @property
    def default_warmup_epochs(self) -> int:
        """The warm-up of a new run that is told of none."""
        longest = [WARMUP_EPOCHS, self.epochs - 1]
        if self.schedule == "step" and self.decay_epochs and self.decay_epochs[0] < WARMUP_EPOCHS:
            longest.append(int(self.decay_epochs[0]))
        return max(min(longest), 0)

    @property
    def warmup(self) -> int:
        """The epochs of the warm-up."""
        assert self.warmup_epochs is not None
        return self.warmup_epochs

    def total_steps(self, steps_per_epoch: int) -> int:
        """The steps that a run makes."""
        num_steps = self.epochs * steps_per_epoch
        return min(num_steps, self.max_steps or num_steps)

    def mistakes(self) -> list[str]:
        """What is out of range or contradicts itself, one sentence each."""
        at, cosine = self.decay_epochs, self.schedule == "cosine"
        rules = [
            (
                self.warmup < max(self.epochs, 1),
                f"--warmup_epochs {self.warmup} contradicts --epochs {self.epochs}: "
                "it must be smaller",
            ),
            (cosine or bool(at), f"--schedule {self.schedule} needs --decay_epochs"),
            (
                not cosine or (at is None and self.decay_rate == ScheduleOptions.decay_rate),
                "--decay_epochs and --decay_rate contradict --schedule cosine",
            ),
            (
                cosine or self.final_learning_rate == 0,
                f"--final_learning_rate contradicts --schedule {self.schedule}: a cosine ends there",
            ),
            (
                self.schedule != "exponential" or not at or (len(at) == 1 and at[0] > 0),
                f"--decay_epochs {at}: --schedule exponential takes one number greater than 0",
            ),
            (
                self.schedule != "step" or not at or (at == sorted(at) and self.warmup <= at[0]),
                f"--decay_epochs {at}: must rise, from --warmup_epochs {self.warmup} on",
            ),
            (
                0 < self.decay_rate <= 1,
                f"--decay_rate {self.decay_rate}: must be greater than 0 and at most 1",
            ),
        ]
        return broken(rules) + out_of_range(
            self,
            at_least={"epochs": 1, "max_steps": 1, "warmup_epochs": 0},
            at_most={"epochs": LARGEST, "max_steps": LARGEST},
        )


def build_schedule(
    options: ScheduleOptions, optimizer: Optimizer, *, steps_per_epoch: int
) -> Scheduler:
    """Linear warm-up, then what --schedule says; a cosine is at its end after the last step.

    `schedule.step_update(step)` before a step sets its learning rate from `step` alone, so a
    resumed run has no schedule to restore.
    """
    total_steps = options.total_steps(steps_per_epoch)
    warmup_steps = min(options.warmup * steps_per_epoch, total_steps - 1)
    peak = optimizer.defaults["lr"]
    common: dict[str, Any] = {
        "warmup_t": warmup_steps,
        # A warm-up from zero would lose the first step.
        "warmup_lr_init": peak / (warmup_steps + 1),
        # Without it the schedule starts part-way down and the rate jumps where warm-up ends.
        "warmup_prefix": True,
        "t_in_epochs": False,
    }
    if options.schedule == "cosine":
        # A single step is at the peak with either length; timm warns of a length of 1.
        length = max(total_steps - warmup_steps, 2)
        return CosineLRScheduler(optimizer, length, lr_min=options.final_learning_rate, **common)
    assert options.decay_epochs
    decay_steps = [epochs * steps_per_epoch for epochs in options.decay_epochs]
    if options.schedule == "exponential":
        factor = options.decay_rate ** (1 / decay_steps[0])
        return StepLRScheduler(optimizer, decay_t=1, decay_rate=factor, **common)
    # timm counts from the end of the warm-up, and lowers the rate one step before a milestone.
    milestones = [round(steps) - warmup_steps + 1 for steps in decay_steps]
    return MultiStepLRScheduler(
        optimizer, decay_t=milestones, decay_rate=options.decay_rate, **common
    )
