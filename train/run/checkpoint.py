"""Checkpoint files: which of them stay, and how one is verified while it is read.

A run's folder holds step-N.pt for the last steps saved, last.pt as another name of the newest, and
best.pt of the best k-NN accuracy, where there are validation images to choose by. last.pt is made
last: until then the one before is the newest.
"""

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from run.atomic_write import TEMPORARY, link_file, replace_file
from run.errors import UserError
from run.out_of_memory import is_out_of_memory
from run.rules import out_of_range

LAST = "last.pt"
BEST = "best.pt"
STEP = "step-{}.pt"
ZIP = b"PK\x03\x04"


@dataclass
class CheckpointOptions:
    """Checkpoints.

    Args:
        save_every: Steps between checkpoints within an epoch. 0: only at the end of each epoch.
        keep: Number of checkpoints to keep. last.pt is the newest. With 2 or more, an older one is
            there if the newest is damaged. best.pt is kept, too: the best k-NN accuracy on the
            images of validation_fraction.
    """

    save_every: int = 0
    keep: int = 2

    def mistakes(self) -> list[str]:
        """What is out of range, one sentence each."""
        return out_of_range(self, at_least={"save_every": 0, "keep": 1})


class DamagedCheckpoint(UserError):
    """A file that is there and does not hold what pretrain.py writes."""


@dataclass
class RunState:
    """How far a run has come: whole epochs, steps, and accuracies (shares of 1), k-NN's but one."""

    raw_pixels: float
    untrained: float
    accuracy: float
    best: float = -1.0  # of a trained network; none was evaluated yet
    epoch: int = 0
    step: int = 0
    skipped: int = 0  # of those steps, for a gradient that overflowed fp16
    probe: float | None = None  # where there is one, once it is trained


def save_checkpoint(folder: Path, state: RunState, *, keep: int, best: bool, **rest: Any) -> None:
    """Write a checkpoint, whole or not at all, and drop those that are no longer to be kept."""
    # Packed in memory: where the disk is full, torch.save into a file hides the reason.
    packed = io.BytesIO()
    torch.save({"state": asdict(state), **rest}, packed)
    path = folder / STEP.format(state.step)
    replace_file(path, lambda file: file.write(packed.getbuffer()))
    if best:
        link_file(path, folder / BEST)
    link_file(path, folder / LAST)

    # What lies beyond this step was left by a run that was taken back to before it.
    steps = _steps_saved(folder)
    past = [step for step in steps if step <= state.step]
    for step in set(steps) - set(past[-keep:]):
        (folder / STEP.format(step)).unlink(missing_ok=True)
    for unfinished in folder.glob(STEP.format("*") + TEMPORARY):
        unfinished.unlink(missing_ok=True)


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run that it can go on from, the newest first."""
    steps = [folder / STEP.format(step) for step in reversed(_steps_saved(folder))]
    return [path for path in (folder / LAST, *steps) if path.is_file()]


def read_file(path: Path) -> object:
    """Read a checkpoint file to the CPU, without running code from it, once its checksums hold.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        # torch.load itself takes flipped bits for weights. It goes by the first bytes, and would
        # unpickle another format by code that checks less; zipfile goes by the last.
        with open(path, "rb") as file, zipfile.ZipFile(file) as records:
            file.seek(0)
            if file.read(len(ZIP)) != ZIP:
                raise ValueError("it does not begin as a zip file")
            damaged = records.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of its record {damaged} does not hold")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        _raise_if_of_machine(path, error)
        raise DamagedCheckpoint(f"{path} is not a readable checkpoint: {error}") from error


@contextmanager
def restored_from(path: Path) -> Iterator[None]:
    """Turn what goes wrong while the contents of a checkpoint are put to use into one line."""
    try:
        yield
    except (
        AttributeError, IndexError, KeyError, MemoryError, RuntimeError, TypeError, ValueError
    ) as error:  # fmt: skip
        _raise_if_of_machine(path, error)
        reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise DamagedCheckpoint(f"{path} is damaged: {shorten(reason, 300)}") from error


def _raise_if_of_machine(path: Path, error: Exception) -> None:
    """Raise an error with which nothing is said of the checkpoint."""
    if is_out_of_memory(error):
        reason = shorten(str(error), 200)
        raise UserError(f"out of memory while {path} is loaded ({reason})") from error
    if "CUDA error" in str(error):
        raise error


def check_finite(content: object, name: str = "weights") -> None:
    """Refuse tensors, in dictionaries and lists of any depth, that hold NaN or infinity.

    Raises:
        ValueError: names the first of them.
    """
    if isinstance(content, Tensor):
        if not content.isfinite().all():
            raise ValueError(f"its {name} is not finite")
    elif isinstance(content, dict):
        for key, value in content.items():
            check_finite(value, f"{name}.{key}")
    elif isinstance(content, (list, tuple)):
        for number, value in enumerate(content):
            check_finite(value, f"{name}.{number}")


def _steps_saved(folder: Path) -> list[int]:
    prefix, suffix = STEP.split("{}")
    names = [path.name[len(prefix) : -len(suffix)] for path in folder.glob(STEP.format("*"))]
    return sorted(int(name) for name in names if name.isdecimal())
