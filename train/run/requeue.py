"""Leaving when the scheduler asks: a signal is noted, and acted on between two steps.

SIGTERM and SIGUSR1 are what Slurm, Kubernetes and torchrun send ahead of SIGKILL. A signal to one
of several processes stops all of them after the same step, at most eight later.
"""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from run import next_steps
from run.processes import ALONE, Ranks

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later
MARK = "REQUEUE"
# How often the processes of a run ask each other, who would wait for the slowest in every step.
STEPS_PER_QUESTION = 8


class Requeue(SystemExit):
    """Ends the process such that it is to be started again; what there is to save is saved first."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class Requests:
    """While entered, SIGTERM and SIGUSR1 make `check` raise; leaving by that marks the folder."""

    SIGNALS = tuple(
        getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)
    )

    def __init__(self, folder: Path, ranks: Ranks = ALONE) -> None:
        self.mark = folder / MARK
        self.ranks = ranks
        self.received = 0

    def check(self, save: Callable[[], object], *, step: int = 0) -> None:
        """Save and raise Requeue if a signal has come; called where the state of a run is whole.

        Every process calls it after the same steps: a signal to one is for all. Of several processes
        each hears of it after the next `step` that is a multiple of STEPS_PER_QUESTION.
        """
        if self.ranks.world_size > 1 and step % STEPS_PER_QUESTION != 0:
            return
        agreed = self.ranks.max(self.received)
        if agreed:
            self.received = agreed
            save()
            raise Requeue

    def __enter__(self) -> "Requests":
        self.before: dict[int, Any] = {
            number: signal.signal(number, self._note) for number in self.SIGNALS
        }
        self.mark.unlink(missing_ok=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Requeue):
            if self.ranks.is_rank_0:
                self.mark.touch()
                name = signal.Signals(self.received).name
                print(
                    f"{name}: stopped after saving; continue by {next_steps.resume(self.mark.parent)}",
                    file=sys.stderr,
                )
            # The first that ends has torchrun end the others, who must not be saving any more.
            self.ranks.max(0)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
