"""What a run records while it runs: metrics.csv, timings.csv, the loggers of --log, its progress.

metrics.csv holds no clock: two runs of one config write the same bytes. Times are in timings.csv.
"""

import csv
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from run.atomic_write import replace_text
from run.checkpoint import RunState
from run.clock import PHASES, PhaseClock, shares
from run.loggers import Logger, open_loggers
from run.options import PretrainOptions
from run.progress import ProgressBar
from training.divergence import DivergenceCheck

METRICS = (
    "step",
    "epoch",
    "learning_rate",
    "loss",
    "gradient_norm",  # before --clip_grad
    "knn_accuracy",
    "probe_accuracy",
)
# Of the training: the phases of its steps, which fill it.
TIMINGS = (
    "step",
    "epoch",
    "images_per_second",
    "training_seconds",
    *(f"{phase}_seconds" for phase in PHASES),
    "evaluation_seconds",
)
# Losses stay on the device between flushes: reading each one would make the device wait.
STEPS_PER_FLUSH = 10


class Table:
    """A CSV file with a row or more per step, cut back to where a run goes on from (None: empty).

    The first columns are step and epoch; a row without a loss closes its epoch.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], *, resumed: RunState | None) -> None:
        lines = [",".join(columns) + "\n"]
        if resumed is not None and path.is_file():
            with open(path, newline="") as file:
                # A run of an older version has written fewer columns.
                written = tuple(next(file, "").rstrip("\n").split(","))
                past = takewhile(lambda line: _is_past(line, written, resumed), file)
                lines += [_in_columns(line, written, columns) for line in past]
        replace_text(path, "".join(lines))
        self.file = open(path, "a", newline="")  # noqa: SIM115
        self.writer = csv.DictWriter(self.file, columns, lineterminator="\n")

    def add(self, **values: float | int) -> None:
        """Append a row; nine digits tell any two float32 numbers apart."""
        self.writer.writerow(
            {key: f"{v:.9g}" if isinstance(v, float) else v for key, v in values.items()}
        )

    def sync(self) -> None:
        """Have every row on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _is_past(line: str, columns: tuple[str, ...], state: RunState) -> bool:
    # The process may have died in the middle of a row, whose "1" was to be "12".
    if not line.endswith("\n"):
        return False
    row = dict(zip(columns, line.rstrip("\n").split(",")))
    closed = state.epoch if not row.get("loss") else math.inf
    return int(row["step"]) <= state.step and int(row["epoch"]) <= closed


def _in_columns(line: str, written: tuple[str, ...], columns: tuple[str, ...]) -> str:
    row = dict(zip(written, line.rstrip("\n").split(",")))
    return ",".join(row.get(column, "") for column in columns) + "\n"


class NoRecord:
    """Stands in for a table or a progress bar where none is wanted."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **options: None


class Report:
    """The records of one run, continued from `resumed` (None: begun anew).

    Args:
        folder: where to write; None: of several processes each checks the numbers, and one writes.
        phases: marks what the time of each step is spent on.
    """

    def __init__(
        self,
        folder: Path | None,
        resumed: RunState | None,
        options: PretrainOptions,
        *,
        total_steps: int,
        divergence: DivergenceCheck,
        phases: PhaseClock,
    ) -> None:
        self.metrics: Any = NoRecord()
        self.timings: Any = NoRecord()
        self.loggers: list[Logger] = []
        self.progress: Any = NoRecord()
        if folder is not None:
            self.loggers = open_loggers(options.logging, folder, resumed, options.flat())
            if "csv" in options.logging.chosen:
                self.metrics = Table(folder / "metrics.csv", METRICS, resumed=resumed)
                self.timings = Table(folder / "timings.csv", TIMINGS, resumed=resumed)
            step = 0 if resumed is None else resumed.step
            self.progress = ProgressBar(step=step, total_steps=total_steps, device=phases.device)
        self.images_per_step = options.batches.batch_size  # of all processes together
        self.divergence = divergence
        self.skipped_said = self.divergence.num_skipped
        # Of each step: its number, its epoch, its learning rate; its loss and gradient norm.
        self.pending: list[tuple[int, int, float, Tensor]] = []
        self.flushed_at = 0.0
        self.phases = phases
        self.seconds = {"training": 0.0, "evaluation": 0.0}
        self.epoch_steps = 0

    def __enter__(self) -> "Report":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for record in (self.progress, self.metrics, self.timings, *self.loggers):
            record.close()

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Count the time of a block as "training" or "evaluation"."""
        began = self.flushed_at = time.perf_counter()
        if part == "training":
            self.phases.begin()
        yield
        self._flush()
        self.seconds[part] += time.perf_counter() - began

    def step(
        self, state: RunState, learning_rate: float, loss: Tensor, gradient_norm: Tensor
    ) -> None:
        """Record the step just made, of scalars on its device, in an epoch that is not over."""
        measured = torch.stack([loss, gradient_norm])
        self.pending.append((state.step, state.epoch + 1, learning_rate, measured))
        self.epoch_steps += 1
        if len(self.pending) == STEPS_PER_FLUSH:
            self._flush()

    def accuracy(self, state: RunState) -> None:
        """Record an evaluation."""
        measured = {"knn_accuracy": state.accuracy}
        said = f"epoch {state.epoch}  k-NN {state.accuracy:.2%}"
        if state.probe is not None:
            measured["probe_accuracy"] = state.probe
            said += f"  probe {state.probe:.2%}"
        self.metrics.add(step=state.step, epoch=state.epoch, **measured)
        for logger in self.loggers:
            logger.add(state.step, measured)
        if state.step > 0:
            self.say(said)

    def end_epoch(self, state: RunState, *, evaluated: bool) -> None:
        """Close an epoch with its times, and with the accuracy if it was evaluated."""
        phases = self.phases.read()
        if self.divergence.num_skipped > self.skipped_said:
            self.skipped_said = self.divergence.num_skipped
            self.say(
                f"epoch {state.epoch}  steps skipped so far for an overflow of fp16: "
                f"{self.skipped_said}"
            )
        if evaluated:
            self.accuracy(state)
            self.say(f"epoch {state.epoch}  time of its steps: {shares(phases)}")
        images = self.epoch_steps * self.images_per_step
        self.timings.add(
            step=state.step,
            epoch=state.epoch,
            images_per_second=images / self.seconds["training"],
            training_seconds=self.seconds["training"],
            **{f"{phase}_seconds": seconds for phase, seconds in phases.items()},
            evaluation_seconds=self.seconds["evaluation"],
        )
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        self.epoch_steps = 0

    def say(self, text: str) -> None:
        """Print a line."""
        self.progress.say(text)

    def end_training(self) -> None:
        """Stop the progress bar: what is printed from now on comes below it."""
        self.progress.close()

    def sync(self, state: RunState) -> None:
        """Check every step made, count those skipped, and have every row on the disk.

        A checkpoint of `state` relies on it.
        """
        self._flush()
        state.skipped = self.divergence.num_skipped
        self.metrics.sync()
        self.timings.sync()
        for logger in self.loggers:
            logger.flush()

    def _flush(self) -> None:
        if not self.pending:
            return
        measured = torch.stack([values for *_, values in self.pending]).tolist()
        for (step, epoch, learning_rate, _), (loss, gradient) in zip(self.pending, measured):
            if warning := self.divergence.check(step, learning_rate, loss, gradient):
                self.say(warning)
            values = {"learning_rate": learning_rate, "loss": loss, "gradient_norm": gradient}
            self.metrics.add(step=step, epoch=epoch, **values)
            for logger in self.loggers:
                logger.add(step, values)
        now = time.perf_counter()
        speed = len(measured) * self.images_per_step / (now - self.flushed_at)
        self.progress.show(step, epoch, loss, speed)
        self.pending.clear()
        self.flushed_at = now
