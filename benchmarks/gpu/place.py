"""Where a stage runs, and what its parts are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Items = dict[str, Callable[[], Iterable[Row]]]
"""What a stage's ``items(place)`` answers: its parts by name, each of which yields rows."""


class Skipped(Exception):
    """There is nothing to do here; the message says why."""


@dataclass(frozen=True)
class Place:
    """The device, and how much of it and of the time a stage may take.

    Attributes:
        device: "cuda", or "cpu" to rehearse.
        backend: of supcon_loss.
        is_tiny: sizes to rehearse with.
        num_jobs: processes that may compile at once.
        deadline: no part begins after this, in seconds of ``time.time()``.
        folder: of the journal, where the rates stand that the facts have measured.
        data_root: of Fashion-MNIST, for the training driver; "": it takes digits.
    """

    device: str = "cuda"
    backend: str = "triton"
    is_tiny: bool = False
    num_jobs: int = 1
    deadline: float = float("inf")
    folder: str = ""
    data_root: str = ""

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.time()

    @property
    def is_late(self) -> bool:
        return self.seconds_left <= 0

    def needs_cuda(self) -> None:
        """Skip where there is no such device."""
        if self.device != "cuda":
            raise Skipped(f"there is none on {self.device}")


def first_line(failure: BaseException) -> str:
    """The failure in one line of at most 300 characters."""
    lines = str(failure).strip().splitlines() or [""]
    return f"{type(failure).__name__}: {lines[0]}"[:300]
