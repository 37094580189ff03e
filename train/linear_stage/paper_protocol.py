"""The linear stage as papers run it: a classifier trained on random views of the training images.

The encoder is frozen, and all learning rates and weight decays that are tried see the same embeddings;
or it is trained, too, anew with each of them. The validation images choose.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.batches import Batches
from data.order import TrainingOrder
from data.views import Augment, ViewOptions, Views
from linear_stage.classifier import Accuracy, LinearClassifier
from network.embedder import Embedder
from run.errors import UserError
from run.rules import broken, out_of_range
from training.optimizer import OptimizerName, OptimizerOptions, build_optimizer
from training.schedule import ScheduleOptions, build_schedule
from training.trainer import StepOptions

PAPER = "paper"
ENCODER_LEARNING_RATE = 0.01


@dataclass
class PaperOptions:
    """The classifier that is trained on random views (--protocol paper).

    Args:
        optimizer: As in pretrain.py.
        learning_rate: The peak; not scaled by the batch size. Of several, such as [1,5,25], the
            validation images choose one.
        rmsprop_eps: As in pretrain.py; 0.001 is that of the SupCon authors' linear stage.
        label_smoothing: The share of each label that is spread over all classes.
        unit_length: Scale embeddings to length 1 before the classifier.
        augment: As in pretrain.py, except auto: digits for the data set digits, otherwise crop_flip.
        min_crop_area: As in pretrain.py.
        finetune: Train the encoder, too.
        encoder_learning_rate: Learning rate of the encoder, with --finetune. Default: 0.01.
    """

    optimizer: OptimizerName = "momentum"
    learning_rate: float | list[float] = 5.0
    rmsprop_eps: float = 0.001
    label_smoothing: float = 0.0
    unit_length: bool = True
    augment: Augment = "auto"
    min_crop_area: float = ViewOptions.min_crop_area
    finetune: bool = False
    encoder_learning_rate: float | None = None

    def mistakes(self) -> list[str]:
        """What is out of range or contradicts itself, one sentence each."""
        rules = [
            (
                bool(self.learning_rates) and min(self.learning_rates) > 0,
                f"--learning_rate {self.learning_rate}: must be greater than 0",
            ),
            (
                0 <= self.label_smoothing < 1,
                f"--label_smoothing {self.label_smoothing}: must be at least 0 and less than 1",
            ),
            (
                self.optimizer == "rmsprop" or self.rmsprop_eps == PaperOptions.rmsprop_eps,
                f"--rmsprop_eps contradicts --optimizer {self.optimizer}",
            ),
            (
                self.finetune or self.encoder_learning_rate is None,
                "--encoder_learning_rate needs --finetune",
            ),
        ]
        return (
            broken(rules)
            + out_of_range(self, greater_than_0=("rmsprop_eps", "encoder_learning_rate"))
            + ViewOptions(self.augment, self.min_crop_area).mistakes()
        )

    @property
    def learning_rates(self) -> list[float]:
        """Those to choose from."""
        return as_list(self.learning_rate)

    @property
    def encoder_rate(self) -> float:
        """That of the encoder."""
        return self.encoder_learning_rate or ENCODER_LEARNING_RATE

    def views(self, dataset: str) -> ViewOptions:
        """What changes from view to view of the images of a data set."""
        plain: Augment = "digits" if dataset == "digits" else "crop_flip"
        augment = plain if self.augment == "auto" else self.augment
        return ViewOptions(augment, self.min_crop_area, num_views=1)

    def candidates(self, weight_decays: list[float]) -> list[OptimizerOptions]:
        """Every learning rate with every weight decay."""
        eps = {"rmsprop_eps": self.rmsprop_eps} if self.optimizer == "rmsprop" else {}
        return [
            OptimizerOptions(self.optimizer, rate, decay, decay_norm_and_bias="bias", **eps)
            for rate, decay in product(self.learning_rates, weight_decays)
        ]


def as_list(values: float | list[float]) -> list[float]:
    """Several values, or one as a list."""
    return values if isinstance(values, list) else [values]


@dataclass
class Trial:
    """A learning rate and a weight decay, and what came of them.

    Attributes:
        top1_validation: None where there are no validation images, or its loss was not finite.
    """

    learning_rate: float
    weight_decay: float
    top1_validation: float | None = None
    top5_validation: float | None = None


class Chosen(NamedTuple):
    """The best of some trials: its classifier, and the network that embeds for it."""

    model: Embedder
    classifier: LinearClassifier
    trial: Trial


@dataclass(eq=False)
class PaperTraining:
    """Trains classifiers on random views of the training images.

    Args:
        precision: of the encoder, which is that of the run.
        order, batches: of the training images, on the device.
        seed: of the first weights.
    """

    options: PaperOptions
    schedule: ScheduleOptions
    precision: StepOptions
    order: TrainingOrder
    batches: Batches
    views: Views
    num_classes: int
    seed: int

    def train(self, model: Embedder, candidates: list[OptimizerOptions]) -> list[LinearClassifier]:
        """Train a classifier by each candidate, all on the same embeddings.

        Args:
            model: with `finetune` trained together with the classifier of the only candidate.
        """
        finetune, device = self.options.finetune, self.batches.device
        torch.manual_seed(self.seed)
        start = nn.Linear(model.num_features, self.num_classes).to(device)
        layers = [copy.deepcopy(start) for _ in candidates]
        optimizers = [build_optimizer(*pair) for pair in zip(candidates, layers)]
        if finetune:
            [candidate] = candidates
            of_encoder = replace(candidate, learning_rate=self.options.encoder_rate)
            optimizers.append(build_optimizer(of_encoder, model.encoder))
        schedules = [
            build_schedule(self.schedule, optimizer, steps_per_epoch=len(self.order))
            for optimizer in optimizers
        ]
        scaled = finetune and self.precision.precision == "fp16"
        scaler = torch.amp.GradScaler(device.type, enabled=scaled)

        model.train(finetune)
        step, total_steps = 0, self.schedule.total_steps(len(self.order))
        num_epochs = math.ceil(total_steps / len(self.order))
        for epoch in range(num_epochs):
            self.order.begin(epoch)
            first, total = step, torch.zeros(len(layers), device=device)
            for images, labels in islice(self.batches, total_steps - step):
                for schedule in schedules:
                    schedule.step_update(step)
                losses = self._losses(
                    model, layers, self.views.random(images, step=step, view=0), labels
                )
                for optimizer in optimizers:
                    optimizer.zero_grad()
                scaler.scale(losses.sum()).backward()
                for optimizer in optimizers:
                    scaler.step(optimizer)
                scaler.update()
                total += losses.detach()
                step += 1
            mean = total / (step - first)
            print(f"epoch {epoch + 1} of {num_epochs}: {_said(mean)}", flush=True)
            if not mean.isfinite().any():
                break
        return [
            LinearClassifier(
                layer.weight.detach(), layer.bias.detach(), self.options.unit_length, PAPER
            )
            for layer in layers
        ]

    def _losses(
        self, model: Embedder, layers: list[nn.Linear], rows: Tensor, labels: Tensor
    ) -> Tensor:
        """Of every layer: (K,). No layer's gradient depends on another."""
        with (
            torch.set_grad_enabled(self.options.finetune),
            self.precision.autocast(rows.device),
        ):
            embedded = model.encoder(rows)
        seen = embedded.float()
        if self.options.unit_length:
            seen = F.normalize(seen, dim=1)
        smoothing = self.options.label_smoothing
        losses = [
            F.cross_entropy(layer(seen), labels, label_smoothing=smoothing) for layer in layers
        ]
        return torch.stack(losses)


def train_and_choose(
    training: PaperTraining,
    model: Embedder,
    candidates: list[OptimizerOptions],
    validate: Callable[[Embedder, list[LinearClassifier]], list[Accuracy]] | None,
) -> tuple[Chosen, list[Trial]]:
    """Train by every candidate, and choose the best on the validation images; returns it and all.

    Args:
        model: stays as it is; with `finetune` copies of it are trained.
        validate: gives the accuracies of classifiers on the validation images; None where there are
            none, and so one candidate.

    Raises:
        UserError: no candidate led to a loss that is finite.
    """
    finetune = training.options.finetune
    best: Chosen | None = None
    trials = []
    for group in [[candidate] for candidate in candidates] if finetune else [candidates]:
        trained = copy.deepcopy(model) if finetune else model
        classifiers = training.train(trained, group)
        found = validate(trained, classifiers) if validate else [(None, None)] * len(group)
        for candidate, classifier, accuracy in zip(group, classifiers, found):
            trial = Trial(candidate.learning_rate, candidate.weight_decay)
            trials.append(trial)
            if not classifier.is_finite:
                continue
            trial.top1_validation, trial.top5_validation = accuracy
            if best is None or (trial.top1_validation or 0) > (best.trial.top1_validation or 0):
                best = Chosen(trained, classifier, trial)
    if best is None:
        raise UserError(
            f"--learning_rate {training.options.learning_rate}: the loss is not finite: lower it"
        )
    if finetune:
        best.classifier.encoder = best.model.encoder.state_dict()
    return best, trials


def _said(losses: Tensor) -> str:
    if len(losses) == 1:
        return f"loss {losses.item():.4f}"
    return f"losses {losses.min().item():.4f} to {losses.max().item():.4f}"
