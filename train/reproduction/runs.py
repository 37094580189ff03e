"""The runs behind the tables: their order, their options, their folders, and what is left of them.

A run is a recipe with some options changed. Its folder is named by the hash of its resolved options, so a
run that several tables need is made once, one that is done is skipped, and one that was stopped goes on.
"""

import hashlib
import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from methods.options import READ_BY, WITH_CLASSIFIER
from reproduction.claims import (
    METHODS,
    RAW_PIXELS,
    RECIPES,
    REFERENCE,
    SUPCON,
    TABLES,
    UNTRAINED,
    Scale,
)
from reproduction.processes import machine, start
from reproduction.scores import scores_of_baseline, scores_of_run
from run.atomic_write import replace_file, replace_text
from run.errors import UserError
from run.options import PretrainOptions
from run.resume import FREE_OPTIONS
from training.divergence import REMEDY

RECORD, SCORES = "paper.json", "scores.npz"
BASELINES = (RAW_PIXELS, UNTRAINED)
VALIDATION_FRACTION = 0.1
# From one learning rate that is tried to the next.
FACTOR = 3.0
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


def jobs_of(tables: Sequence[str], *, seeds: int, trials: int) -> list[Job]:
    """What some tables need, in the order of what settles most.

    Of a table all learning rates first; then seed by seed, so that every seed is a whole comparison.
    """
    jobs = [Job(name, seed) for seed in range(seeds) for name in BASELINES]
    for table in (TABLES[name] for name in TABLES if name in tables):
        tuned = [METHODS[name].of or name for name in table.methods]
        if trials > 1:
            jobs += [Job(name, trial=trial) for name in tuned for trial in range(trials)]
        for seed in range(seeds):
            jobs += [Job(name, seed) for name in table.methods]
            if table.metric == "mce":
                others = [name for name in table.methods if name != REFERENCE]
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

    def options(self, job: Job) -> PretrainOptions | None:
        """Those of a run; None: its learning rate is not chosen yet."""
        options, trial = self._before_tuning(job), job.trial
        if trial is None and self.trials > 1 and job.method not in BASELINES:
            trial = self._best_trial(METHODS[job.method].of or job.method)
            if trial is None:
                return None
        if trial is None:
            return options
        middle = options.optimizer.learning_rate
        rate = middle * FACTOR ** (trial - (self.trials - 1) / 2)
        return options.changed(learning_rate=float(f"{rate:.3g}"))

    def _before_tuning(self, job: Job) -> PretrainOptions:
        """With the learning rate of the recipe."""
        method = METHODS[SUPCON if job.method in BASELINES else job.method]
        values = (
            _recipe(self.scale.recipe)
            | self.scale.options
            | method.options
            | self.local
            | {"seed": job.seed}
        )
        name, epochs = values["method"], self.epochs or values["epochs"]
        if job.trial is not None:
            epochs = min(epochs, self.scale.trial_epochs)
            values["validation_fraction"] = VALIDATION_FRACTION
        values["epochs"] = epochs * method.epochs
        values["warmup_epochs"] = min(values["warmup_epochs"], max(epochs // 5, 1))
        # Of the recipe's options not every method reads all.
        values = {key: value for key, value in values.items() if name in READ_BY.get(key, (name,))}
        options = PretrainOptions.from_flat(values)
        if mistakes := options.mistakes():
            raise UserError(f"{job}: {'; '.join(mistakes)}")
        return options

    def _best_trial(self, method: str) -> int | None:
        """The first of the best on the validation images, once all are made."""
        records = [self.record(Job(method, trial=trial)) for trial in range(self.trials)]
        found = [record["accuracy"] for record in records if record is not None]
        return found.index(max(found)) if len(found) == len(records) else None

    def resolved(self, job: Job) -> dict[str, Any] | None:
        """All that shapes a run, as far as it is not the default."""
        options = self.options(job)
        if options is None:
            return None
        values = {
            name: value for name, value in _not_default(options).items() if name not in PLACES
        }
        if job.method in BASELINES:
            kept = (*vars(options.data), *vars(options.network), "seed")
            values = {key: value for key, value in values.items() if key in kept}
            return values | {"baseline": job.method}
        return values | {"linear": self._linear()}

    def _linear(self) -> dict[str, Any]:
        return {} if self.scale.linear is None else _recipe(f"linear/{self.scale.linear}")

    def folder(self, job: Job) -> Path | None:
        """Where a run lives."""
        resolved = self.resolved(job)
        if resolved is None:
            return None
        text = json.dumps(resolved, sort_keys=True)
        return self.root / hashlib.sha256(text.encode()).hexdigest()[:12]

    def record(self, job: Job) -> dict[str, Any] | None:
        """What was written of a job when it was done."""
        folder = self.folder(job)
        path = folder / ("evaluation.json" if job.corrupted else RECORD) if folder else None
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

    def cost(self, job: Job) -> float:
        """How long a job takes, beside others: in passes over the training images."""
        if job.corrupted or job.method in BASELINES:
            return 1.0
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
            scores, labels = self._make(job, folder)
            content = io.BytesIO()
            np.savez(content, scores=scores.numpy(), labels=labels.numpy())
            replace_file(folder / SCORES, lambda file: file.write(content.getvalue()))
            record["accuracy"] = (scores.argmax(1) == labels).double().mean().item()
        except UserError as error:
            if REMEDY not in str(error):
                raise
            record |= {"accuracy": 0.0, "failed": str(error)}
        record |= {"cost": self.cost(job), "seconds": time.monotonic() - began}
        replace_text(folder / RECORD, json.dumps(record, indent=2) + "\n")

    def _make(self, job: Job, folder: Path) -> tuple[Tensor, Tensor]:
        options = self.options(job)
        assert options is not None
        if job.method in BASELINES:
            return scores_of_baseline(folder, options, untrained=job.method == UNTRAINED)
        if not (folder / "results.json").is_file():
            place = {"output_dir": folder.parent, "name": folder.name, "resume": "auto"}
            start("pretrain.py", folder, **_not_default(options) | place)
        if options.method.method not in WITH_CLASSIFIER and not (folder / "linear.pt").is_file():
            start("linear.py", folder, checkpoint=folder, **self._linear())
        return scores_of_run(folder, options)

    def _corrupt(self, job: Job, folder: Path) -> None:
        start(
            "evaluate.py",
            folder,
            checkpoint=folder,
            baseline=self.folder(Job(REFERENCE, job.seed)),
            corruption_images=self.scale.corruption_images,
        )


@cache
def _recipe(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((RECIPES / name).read_text())
    return values


def _not_default(options: PretrainOptions) -> dict[str, Any]:
    """The options that are not the default: an option that is added later changes no hash."""
    default = PretrainOptions().flat()
    return {name: value for name, value in options.flat().items() if value != default[name]}
