"""What a run says while it runs: metrics.csv, timings.csv, TensorBoard and the progress line.

metrics.csv holds no clock: two runs of one config write the same bytes. Times are in timings.csv.
"""

import csv
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from checkpoint import RunState
from config import UserError

METRICS = ("step", "epoch", "learning_rate", "loss", "knn_accuracy")
TIMINGS = ("step", "epoch", "images_per_second", "training_seconds", "evaluation_seconds")
# Losses stay on the device between flushes: reading each one would make the device wait.
STEPS_PER_FLUSH = 10
SECONDS_PER_LINE = 5.0


class Table:
    """A CSV file with a row or more per step, cut back to `last_step` when opened."""

    def __init__(self, path: Path, columns: tuple[str, ...], *, last_step: int | None) -> None:
        kept: list[dict[str, str]] = []
        if last_step is not None and path.is_file():
            with open(path, newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) <= last_step]
        self.file = open(path, "w", newline="")  # noqa: SIM115
        self.writer = csv.DictWriter(self.file, columns, lineterminator="\n")
        self.writer.writeheader()
        self.writer.writerows(kept)

    def add(self, **values: float | int) -> None:
        """Append a row; nine digits tell any two float32 numbers apart."""
        self.writer.writerow(
            {key: f"{v:.9g}" if isinstance(v, float) else v for key, v in values.items()}
        )

    def sync(self) -> None:
        """Have every row on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())


class ProgressLine:
    """A bar in a terminal; elsewhere a line every few seconds."""

    def __init__(self, *, step: int, total_steps: int) -> None:
        console = Console()
        self.plain = not console.is_terminal
        self.first, self.total = step, total_steps
        self.began = self.said = time.monotonic()
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:.0f} images/s"),
            TimeRemainingColumn(),
            console=console,
            disable=self.plain,
        )
        self.task = self.bar.add_task(
            "", total=total_steps, completed=step, epoch=1, loss=float("nan"), speed=0.0
        )
        self.bar.start()

    def show(self, step: int, epoch: int, loss: float, images_per_second: float) -> None:
        """Report that `step` steps are done, in the given epoch counted from 1."""
        self.bar.update(self.task, completed=step, epoch=epoch, loss=loss, speed=images_per_second)
        now = time.monotonic()
        if self.plain and (now - self.said >= SECONDS_PER_LINE or step == self.total):
            self.said = now
            left = (now - self.began) / (step - self.first) * (self.total - step)
            print(
                f"epoch {epoch}  step {step}/{self.total}  loss {loss:.4f}  "
                f"{images_per_second:.0f} images/s  {left:.0f} s left",
                flush=True,
            )

    def say(self, text: str) -> None:
        """Print a line that stays, above the bar if there is one."""
        self.bar.console.print(text, highlight=False, soft_wrap=True)


class Report:
    """The records of one run, continued after `step` steps (None: begun anew)."""

    def __init__(
        self, folder: Path, step: int | None, total_steps: int, *, images_per_step: int
    ) -> None:
        self.metrics = Table(folder / "metrics.csv", METRICS, last_step=step)
        self.timings = Table(folder / "timings.csv", TIMINGS, last_step=step)
        purge = 0 if step is None else step + 1
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
        self.progress = ProgressLine(step=step or 0, total_steps=total_steps)
        self.images_per_step = images_per_step
        self.pending: list[tuple[int, int, float, Tensor]] = []
        self.flushed_at = 0.0
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
        self.progress.bar.stop()
        self.metrics.file.close()
        self.timings.file.close()
        self.board.close()

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Count the time of a block as "training" or "evaluation"."""
        began = self.flushed_at = time.perf_counter()
        yield
        self._flush()
        self.seconds[part] += time.perf_counter() - began

    def step(self, state: RunState, learning_rate: float, loss: Tensor) -> None:
        """Record the step just made, of a scalar `loss`, in an epoch that is not over."""
        self.pending.append((state.step, state.epoch + 1, learning_rate, loss.detach()))
        self.epoch_steps += 1
        if len(self.pending) == STEPS_PER_FLUSH:
            self._flush()

    def accuracy(self, state: RunState) -> None:
        """Record a k-NN evaluation."""
        self.metrics.add(step=state.step, epoch=state.epoch, knn_accuracy=state.accuracy)
        self.board.add_scalar("knn_accuracy", state.accuracy, state.step)
        if state.step > 0:
            self.progress.say(f"epoch {state.epoch}  k-NN {state.accuracy:.2%}")

    def end_epoch(self, state: RunState) -> None:
        """Close an epoch: its times, and every row on the disk before the checkpoint."""
        images = self.epoch_steps * self.images_per_step
        self.timings.add(
            step=state.step,
            epoch=state.epoch,
            images_per_second=images / self.seconds["training"],
            training_seconds=self.seconds["training"],
            evaluation_seconds=self.seconds["evaluation"],
        )
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        self.epoch_steps = 0
        self.metrics.sync()
        self.timings.sync()
        self.board.flush()

    def _flush(self) -> None:
        if not self.pending:
            return
        losses = torch.stack([loss for *_, loss in self.pending]).tolist()
        for (step, epoch, learning_rate, _), loss in zip(self.pending, losses):
            if not loss - loss == 0:
                raise UserError(
                    f"the loss is {loss} at step {step}, learning rate {learning_rate:.3g}: "
                    "try a lower --learning_rate or a longer --warmup_epochs"
                )
            self.metrics.add(step=step, epoch=epoch, learning_rate=learning_rate, loss=loss)
            self.board.add_scalar("loss", loss, step)
            self.board.add_scalar("learning_rate", learning_rate, step)
        now = time.perf_counter()
        speed = len(losses) * self.images_per_step / (now - self.flushed_at)
        self.progress.show(step, epoch, losses[-1], speed)
        self.pending.clear()
        self.flushed_at = now
