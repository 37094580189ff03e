"""Where the time of training goes: the seconds of each phase of a step, from one mark to the next.

On CUDA a mark is an event on the stream: nothing waits for it before the times are read, and the
wait for data is that of the GPU.
"""

import time
from itertools import pairwise

import torch

# Of a step, in order: until its batch is on the device; its random views; the networks; the loss;
# their gradients; the new weights, and the probe's; what is written of it, checkpoints included.
PHASES = ("data", "views", "forward", "loss", "backward", "optimizer", "records")


class PhaseClock:
    """The seconds that a training on `device` spends in each of PHASES."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[str, float | torch.cuda.Event]] = []

    def begin(self) -> None:
        """Start the first phase."""
        self.mark("")

    def mark(self, phase: str) -> None:
        """Close a phase, which began at the last mark."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((phase, event))
        else:
            self.marks.append((phase, time.perf_counter()))

    def read(self) -> dict[str, float]:
        """The seconds of each phase since this was last called; on CUDA it waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = dict.fromkeys(PHASES, 0.0)
        for (_, before), (phase, after) in pairwise(self.marks):
            if phase:
                seconds[phase] += _seconds_between(before, after)
        self.marks.clear()
        return seconds


def shares(seconds: dict[str, float]) -> str:
    """Seconds by phase as whole percents of their sum."""
    total = sum(seconds.values()) or 1.0
    return ", ".join(f"{phase} {part / total:.0%}" for phase, part in seconds.items())


def _seconds_between(before: float | torch.cuda.Event, after: float | torch.cuda.Event) -> float:
    if isinstance(before, float):
        assert isinstance(after, float)
        return after - before
    assert not isinstance(after, float)
    seconds: float = before.elapsed_time(after) / 1e3
    return seconds
