"""The runs behind the tables: their order, their options, their folders, and what is left of them.

A run is a recipe with some options changed. Its folder is named by the hash of its resolved options, so a
run that several tables need is made once, one that is done is skipped, and one that was stopped goes on.
"""

import hashlib
import io
import json
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from methods.options import READ_BY, WITH_CLASSIFIER
from reproduction.claims import SEVERITIES, TABLES
from reproduction.methods import (
    BASELINES,
    LINEAR_RATES,
    METHODS,
    PRETRAINING_RATES,
    REFERENCE,
    UNTRAINED,
    Compared,
    baseline_of,
    tuned_for,
)
from reproduction.processes import machine, refuse_if_stopped, start
from reproduction.scales import RECIPES, TRAINED_LINEAR, Scale
from reproduction.scores import (
    copy_encoder,
    corruptions_of_baseline,
    scores_of_baseline,
    scores_of_run,
)
from run.atomic_write import replace_file, replace_text
from run.checkpoint import LAST
from run.errors import UserError
from run.options import PretrainOptions
from run.resume import FREE_OPTIONS
from training.divergence import REMEDY

RECORD, SCORES, EVALUATION = "paper.json", "scores.npz", "evaluation.json"
VALIDATION_FRACTION = 0.1
# From one learning rate that is tried to the next.
FACTOR = 3.0
# A pass without gradient, of one view, beside a pass with it.
FORWARD = 1 / 3
# Threads share torch's random generator, which a new network takes its weights from.
ONE_AT_A_TIME = Lock()
# Where and how a run is made, which does not change what it ends with.
PLACES = FREE_OPTIONS - {"epochs", "max_steps"}


@dataclass(frozen=True)
class Job:
    """A run to make, or the corruptions to measure of one.

    Attributes:
        method: one of METHODS or BASELINES.
        trial: which of the learning rates is tried, if one is.
    """

    method: str
    seed: int = 0
    trial: int | None = None
    corrupted: bool = False

    def __str__(self) -> str:
        words = [self.method, f"seed {self.seed}" if self.trial is None else f"trial {self.trial}"]
        return " ".join(words + ["corruptions"] * self.corrupted)


def jobs_of(
    tables: Sequence[str], methods: Container[str], scale: Scale, *, seeds: int, trials: int
) -> list[Job]:
    """What some methods of some tables need at a scale, in the order of what settles most.

    Of a table all learning rates first; then seed by seed, so that every seed is a whole comparison.
    """
    chosen = [TABLES[name] for name in TABLES if name in tables]
    baselines = dict.fromkeys(name for table in chosen for name in table.baselines)
    jobs = [Job(name, seed) for seed in range(seeds) for name in baselines]
    for table in chosen:
        asked = [name for name in table.methods if name in methods and scale.has(name)]
        if trials > 1:
            tuned = [other for name in asked for other in tuned_for(name)]
            jobs += [Job(name, trial=trial) for name in tuned for trial in range(trials)]
        for seed in range(seeds):
            encoders = [encoder for name in asked if (encoder := METHODS[name].encoder)]
            jobs += [Job(name, seed) for name in (*encoders, *asked)]
            if table.needs_corruptions:
                others = [name for name in (*table.baselines, *asked) if name != REFERENCE]
                jobs += [Job(name, seed, corrupted=True) for name in others]
    return list(dict.fromkeys(jobs))


@dataclass
class Study:
    """All runs at one scale.

    Args:
        epochs: instead of those of the scale.
        local: options of pretrain.py that say where and how runs are made.
    """

    scale: Scale
    root: Path
    trials: int
    epochs: int | None = None
    local: dict[str, Any] = field(default_factory=dict)
    # Those that are known, which do not change.
    _folders: dict[Job, Path] = field(default_factory=dict, init=False, repr=False)

    def options(self, job: Job) -> PretrainOptions | None:
        """Those of a run, or of the one whose encoder it has; None: a learning rate is not chosen yet."""
        method = _compared(job)
        if method.encoder is not None:
            encoder = self._encoder_of(job)
            return None if encoder is None else self.options(encoder)
        trial = self._trial_of(job)
        if trial is None:
            return None
        options = self._before_tuning(job)
        rate = self._tuned(options.optimizer.learning_rate, trial)
        if "learning_rate" in method.times:
            rate = _rounded(rate * method.times["learning_rate"])
        return options.changed(learning_rate=rate)

    def _trial_of(self, job: Job) -> int | None:
        """Which learning rate a job has, in the middle of those tried where none is; None: not chosen yet."""
        if job.trial is not None or self.trials == 1 or job.method in BASELINES:
            return self.trials // 2 if job.trial is None else job.trial
        return self._best_trial(METHODS[job.method].of or job.method)

    def _tuned(self, rate: float, trial: int) -> float:
        """A learning rate that is tried, of which the one in the middle is given."""
        steps = trial - (self.trials - 1) / 2
        return rate if steps == 0 else _rounded(rate * FACTOR**steps)

    def _encoder_of(self, job: Job) -> Job | None:
        """The run that made the encoder of a linear stage; None: it is not chosen yet."""
        encoder = METHODS[job.method].encoder
        assert encoder is not None
        if job.trial is None:
            return Job(encoder, job.seed)
        trial = self._best_trial(encoder)
        return None if trial is None else Job(encoder, trial=trial)

    def _before_tuning(self, job: Job) -> PretrainOptions:
        """With the learning rate of the recipe."""
        method = _compared(job)
        recipe = {"optimizer": "momentum"} | _recipe(self.scale.recipe) | self.scale.options
        values = recipe | method.options | self.local | {"seed": job.seed}
        values["learning_rate"] = _rate(recipe, values["optimizer"], PRETRAINING_RATES)
        name, epochs = values["method"], self.epochs or values["epochs"]
        if job.trial is not None:
            epochs = min(epochs, self.scale.trial_epochs)
            values["validation_fraction"] = VALIDATION_FRACTION
        values["warmup_epochs"] = min(values["warmup_epochs"], max(epochs // 5, 1))
        values["epochs"] = max(round(epochs * method.times.get("epochs", 1)), 2)
        values["batch_size"] = round(values["batch_size"] * method.times.get("batch_size", 1))
        # Of the recipe's options not every method reads all.
        values = {key: value for key, value in values.items() if name in READ_BY.get(key, (name,))}
        options = PretrainOptions.from_flat(values)
        if mistakes := options.mistakes():
            raise UserError(f"{job}: {'; '.join(mistakes)}")
        return options

    def ready(self, job: Job) -> bool:
        """Whether the runs that a job needs are made: trials, its encoder, those that it corrupts."""
        needed: list[Job | None] = []
        if job.corrupted:
            needed = [Job(job.method, job.seed), Job(REFERENCE, job.seed)]
        elif _compared(job).encoder is not None:
            needed = [self._encoder_of(job)]
        made = (other is not None and self.record(other) is not None for other in needed)
        return self.folder(job) is not None and all(made)

    def _best_trial(self, method: str) -> int | None:
        """The first of the best on the validation images, once all are made."""
        records = [self.record(Job(method, trial=trial)) for trial in range(self.trials)]
        found = [record["accuracy"] for record in records if record is not None]
        return found.index(max(found)) if len(found) == len(records) else None

    def resolved(self, job: Job) -> dict[str, Any] | None:
        """All that shapes a run, as far as it is not the default."""
        options, linear = self.options(job), self._linear(job)
        if options is None or linear is None:
            return None
        values = {
            name: value for name, value in _not_default(options).items() if name not in PLACES
        }
        if baseline := baseline_of(job.method):
            kept = (*vars(options.data), *vars(options.network), "seed")
            values = {key: value for key, value in values.items() if key in kept}
            return values | {"baseline": baseline}
        own = {} if METHODS[job.method].encoder is None else {"two_stages": True}
        return values | {"linear": linear} | own

    def _linear(self, job: Job) -> dict[str, Any] | None:
        """The options of linear.py; None: their learning rate is not chosen yet."""
        recipe = self._linear_recipe(job)
        changes = _compared(job).linear
        if changes is None:
            return recipe
        trial = self._trial_of(job)
        if trial is None:
            return None
        values = recipe | changes
        rate = _rate(recipe, values["optimizer"], LINEAR_RATES)
        values["learning_rate"] = self._tuned(rate, trial)
        return values

    def _linear_recipe(self, job: Job) -> dict[str, Any]:
        """Before a method changes it; empty: the convex one."""
        linear, changes = self.scale.linear, _compared(job).linear
        recipe = {} if linear is None else _recipe(f"linear/{linear}")
        if changes is None:
            return recipe
        recipe = recipe or TRAINED_LINEAR
        if self.epochs is None:
            return recipe
        return recipe | {"epochs": min(recipe["epochs"], self.epochs), "warmup_epochs": 0}

    def folder(self, job: Job) -> Path | None:
        """Where a run lives; None: a learning rate is not chosen yet."""
        if job not in self._folders:
            resolved = self.resolved(job)
            if resolved is None:
                return None
            text = json.dumps(resolved, sort_keys=True)
            self._folders[job] = self.root / hashlib.sha256(text.encode()).hexdigest()[:12]
        return self._folders[job]

    def written(self, job: Job) -> set[Path | None]:
        """The folders that making a job writes to: corruptions are measured of the reference, too."""
        return {self.folder(job)} | (
            {self.folder(Job(REFERENCE, job.seed))} if job.corrupted else set()
        )

    def record(self, job: Job) -> dict[str, Any] | None:
        """What was written of a job when it was done."""
        folder = self.folder(job)
        path = folder / (EVALUATION if job.corrupted else RECORD) if folder else None
        if path is None or not path.is_file():
            return None
        record: dict[str, Any] = json.loads(path.read_text())
        return record if not job.corrupted or "baseline" in record else None

    def scores(self, job: Job) -> tuple[Tensor, Tensor] | None:
        """The (N, C) class scores and (N,) labels of the test images, if the run has made them."""
        folder = self.folder(job)
        if folder is None or self.record(job) is None or not (folder / SCORES).is_file():
            return None
        with np.load(folder / SCORES) as saved:
            return torch.from_numpy(saved["scores"]), torch.from_numpy(saved["labels"])

    def num_tested(self, job: Job) -> int:
        """The test images of a run that is done."""
        found = self.scores(job)
        return 0 if found is None else len(found[1])

    def failed(self, job: Job) -> bool:
        """Whether a run that is done has diverged."""
        return "failed" in (self.record(job) or {})

    def corruptions(self, job: Job) -> dict[str, float]:
        """What was measured of a run on corrupted images, by metric; the reference's errors are 1."""
        folder = self.folder(job)
        path = folder / EVALUATION if folder else None
        results = json.loads(path.read_text()) if path is not None and path.is_file() else {}
        by_severity = results.get("corruptions", {}).get("mean_top1_by_severity", {})
        found = {name: by_severity.get(name[-1]) for name in SEVERITIES}
        of_reference = {"mce": 1.0, "relative_mce": 1.0} if job.method == REFERENCE else {}
        for name in ("mce", "relative_mce"):
            found[name] = results.get("baseline", of_reference).get(name)
        return {name: value for name, value in found.items() if value is not None}

    def cost(self, job: Job) -> float:
        """How long a job takes, beside others: in passes over the training images."""
        if job.corrupted or job.method in BASELINES:
            return 1.0
        if METHODS[job.method].encoder is not None:
            return float(self._linear_recipe(job).get("epochs", 1 / FORWARD) * FORWARD)
        options = self._before_tuning(job)
        return float(options.schedule.epochs * options.num_views)

    def do(self, job: Job) -> None:
        """Make a run, or go on with it, and write its record last.

        Raises:
            UserError: it failed, other than by diverging, which is a result.
        """
        folder, began = self.folder(job), time.monotonic()
        if folder is None:
            raise UserError("its learning rate is not chosen: a trial failed or was left out")
        folder.mkdir(parents=True, exist_ok=True)
        if job.corrupted:
            self._corrupt(job, folder)
            return
        record: dict[str, Any] = {"job": str(job), "options": self.resolved(job), **machine()}
        try:
            self._make(job, folder)
            with ONE_AT_A_TIME:
                refuse_if_stopped()
                scores, labels = self._score(job, folder)
            content = io.BytesIO()
            np.savez(content, scores=scores.numpy(), labels=labels.numpy())
            replace_file(folder / SCORES, lambda file: file.write(content.getvalue()))
            record["accuracy"] = (scores.argmax(1) == labels).double().mean().item()
        except torch.OutOfMemoryError:
            raise UserError("out of memory while its test images were scored") from None
        except UserError as error:
            if REMEDY not in str(error):
                raise
            record |= {"accuracy": 0.0, "failed": str(error)}
        record |= {"cost": self.cost(job), "seconds": time.monotonic() - began}
        replace_text(folder / RECORD, json.dumps(record, indent=2) + "\n")

    def _make(self, job: Job, folder: Path) -> None:
        options, linear = self.options(job), self._linear(job)
        assert options is not None and linear is not None
        if job.method in BASELINES:
            return
        has_encoder = METHODS[job.method].encoder is not None
        if has_encoder:
            self._take_encoder(job, folder)
        elif not (folder / "results.json").is_file():
            place = {"output_dir": folder.parent, "name": folder.name, "resume": "auto"}
            start("pretrain.py", folder, **_not_default(options) | place)
        has_classifier = options.method.method in WITH_CLASSIFIER and not has_encoder
        if not has_classifier and not (folder / "linear.pt").is_file():
            start("linear.py", folder, checkpoint=folder, **self._device(), **linear)

    def _score(self, job: Job, folder: Path) -> tuple[Tensor, Tensor]:
        options = self.options(job)
        assert options is not None
        if job.method in BASELINES:
            return scores_of_baseline(
                folder, options, untrained=baseline_of(job.method) == UNTRAINED
            )
        return scores_of_run(folder, options)

    def _take_encoder(self, job: Job, folder: Path) -> None:
        encoder = self._encoder_of(job)
        record = None if encoder is None else self.record(encoder)
        if encoder is None or record is None:
            raise UserError("its encoder is not made: that run failed or was left out")
        if "failed" in record:
            raise UserError(record["failed"])
        source = self.folder(encoder)
        assert source is not None
        if not (folder / LAST).is_file():
            copy_encoder(source, folder)

    def _corrupt(self, job: Job, folder: Path) -> None:
        reference, num_images = self.folder(Job(REFERENCE, job.seed)), self.scale.corruption_images
        assert reference is not None
        common = {"corruption_images": num_images, **self._device()}
        if job.method not in BASELINES:
            start("evaluate.py", folder, checkpoint=folder, baseline=reference, **common)
            return
        start("evaluate.py", reference, checkpoint=reference, **common)
        options = self.options(job)
        assert options is not None
        with ONE_AT_A_TIME:
            refuse_if_stopped()
            found = corruptions_of_baseline(
                folder,
                options,
                json.loads((reference / EVALUATION).read_text()),
                untrained=baseline_of(job.method) == UNTRAINED,
                num_images=num_images,
            )
        replace_text(folder / EVALUATION, json.dumps(found, indent=2) + "\n")

    def _device(self) -> dict[str, Any]:
        return {name: value for name, value in self.local.items() if name == "device"}


def _compared(job: Job) -> Compared:
    """The method or the baseline of a job."""
    return METHODS[job.method] if job.method in METHODS else BASELINES[job.method]


def _rate(recipe: dict[str, Any], optimizer: str, rates: dict[str, float]) -> float:
    """The learning rate of a recipe, for another optimiser than its own."""
    rate: float = recipe["learning_rate"]
    if optimizer == recipe["optimizer"]:
        return rate
    return _rounded(rate * rates[optimizer] / rates[recipe["optimizer"]])


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


@cache
def _recipe(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((RECIPES / name).read_text())
    return values


def _not_default(options: PretrainOptions) -> dict[str, Any]:
    """The options that are not the default: an option that is added later changes no hash."""
    default = _defaults()
    return {name: value for name, value in options.flat().items() if value != default[name]}


@cache
def _defaults() -> dict[str, Any]:
    return PretrainOptions().flat()
