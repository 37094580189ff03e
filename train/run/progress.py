"""The progress of a training: a bar in a terminal, plain lines elsewhere."""

import time
from datetime import timedelta

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from run.device import gpu_memory

# Between plain lines: a short run shows several, a log of days stays short.
FIRST_PAUSE_SECONDS = 5.0
LONGEST_PAUSE_SECONDS = 60.0


class ProgressBar:
    """Epoch, step, loss, images per second, GPU memory and time left.

    Args:
        step: where the run begins or resumes.
        device: whose memory is shown if it is a GPU.
    """

    def __init__(self, *, step: int, total_steps: int, device: torch.device) -> None:
        console = Console()
        self.plain = not console.is_terminal
        self.first, self.total, self.device = step, total_steps, device
        self.began = self.said = time.monotonic()
        self.pause = FIRST_PAUSE_SECONDS
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=self.plain,
            expand=True,
        )
        self.task = self.bar.add_task("", total=total_steps, completed=step, epoch=1, numbers="")
        self.bar.start()

    def show(self, step: int, epoch: int, loss: float, images_per_second: float) -> None:
        """Report that `step` steps are done, in the given epoch counted from 1."""
        numbers = f"loss {loss:.4f}  {images_per_second:.0f} images/s"
        if memory := gpu_memory(self.device):
            numbers += f"  GPU {memory}"
        self.bar.update(self.task, completed=step, epoch=epoch, numbers=numbers)
        now = time.monotonic()
        if self.plain and (now - self.said >= self.pause or step == self.total):
            self.said = now
            self.pause = min(2 * self.pause, LONGEST_PAUSE_SECONDS)
            left = (now - self.began) / (step - self.first) * (self.total - step)
            print(
                f"epoch {epoch}  step {step}/{self.total}  {numbers}  "
                f"{timedelta(seconds=round(left))} left",
                flush=True,
            )

    def say(self, text: str) -> None:
        """Print a line that stays, above the bar if there is one."""
        self.bar.console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.stop()
