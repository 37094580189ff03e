"""Checkpoints: what they hold, which of them stay, and how one is verified before it is used.

A run's folder holds step-N.pt for the last steps saved, last.pt as another name of the newest, and
best.pt of the best k-NN accuracy. last.pt is made last: until then the one before is the newest.
"""

import io
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from config import PretrainConfig, UserError
from durable import TEMPORARY, link_file, replace_file

LAST = "last.pt"
BEST = "best.pt"
STEP = "step-{}.pt"
# A run may be moved, renamed, or given other workers and checkpoints; every other option shapes it.
FREE_OPTIONS = {
    "data_root", "workers", "device", "timeout_minutes", "save_every", "keep", "output_dir", "name",
    "resume",
}  # fmt: skip


class DamagedCheckpoint(UserError):
    """A file that is there and cannot be read back as it was written."""


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


def load_newest(paths: Sequence[Path]) -> tuple[Path, dict[str, Any]]:
    """Read the first of several checkpoints that is whole, and warn of those before it.

    Raises:
        UserError: none is whole, or the first that is was not written by this version.
    """
    for path in paths[:-1]:
        try:
            return path, load_checkpoint(path)
        except DamagedCheckpoint as damage:
            print(f"warning: {damage}; the one before it is tried", file=sys.stderr)
    return paths[-1], load_checkpoint(paths[-1])


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU, without running code from it, once its checksums hold.

    Raises:
        UserError: there is none, it is damaged, it is not one of ours, or another version wrote it.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        # torch.load itself takes flipped bits for weights.
        with zipfile.ZipFile(path) as records:
            damaged = records.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of its record {damaged} does not hold")
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DamagedCheckpoint(f"{path} is not a readable checkpoint: {error}") from error
    if not isinstance(saved, dict) or "config" not in saved or "model" not in saved:
        raise UserError(f"{path} was not written by pretrain.py")
    known = asdict(PretrainConfig())
    if unknown := saved["config"].keys() - known.keys():
        raise UserError(
            f"{path} was written by another version of pretrain.py; options unknown to this one: "
            f"{', '.join(sorted(unknown))}"
        )
    # Without an option a run was what the default of that option makes it.
    saved["config"] = known | saved["config"]
    return saved


def evaluated_weights(saved: dict[str, Any]) -> dict[str, Tensor]:
    """Of a checkpoint the weights that its run evaluates: their average where it keeps one."""
    average: dict[str, Tensor] | None = saved.get("ema")
    weights: dict[str, Tensor] = saved["model"]
    return weights if average is None else average


def load_weights(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Give a model the weights that `path` holds.

    Raises:
        UserError: they are those of another model.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        # After a first line come the names of all weights that are missing, left over, or unlike.
        difference = shorten(str(error).partition("\n")[2], 200)
        raise UserError(
            f"{path} holds the weights of another model than its options build here: {difference}"
        ) from error


def describe_machine(device: torch.device, world_size: int) -> dict[str, Any]:
    """What, besides the options, the last bits of a run depend on."""
    return {
        "world_size": world_size,
        # A sum on the CPU is divided among its threads.
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
    }


def check_same_run(
    path: Path, saved: dict[str, Any], config: PretrainConfig, machine: dict[str, Any]
) -> None:
    """Refuse to go on from `path` with other options, processes or threads than it was trained."""
    ours, theirs = asdict(config), saved["config"]
    changed = [
        f"--{option} is {ours[option]}, was {theirs[option]}"
        for option in ours
        if option not in FREE_OPTIONS and ours[option] != theirs[option]
    ]
    if changed:
        raise UserError(
            f"cannot resume {path} with other options: {'; '.join(changed)} "
            f"(--config {path.parent / 'config.yaml'} repeats them)"
        )
    for name, kind, remedy in (
        ("world_size", "processes", "torchrun, {} processes in all,"),
        ("threads", "CPU threads", "OMP_NUM_THREADS={}"),
    ):
        now, then = machine[name], saved["machine"][name]
        # Either is None where the run moved from or to another kind of device.
        if now is not None and then is not None and now != then:
            raise UserError(
                f"cannot resume {path} with {now} {kind}, it was trained with {then}: sums taken in "
                f"another order round differently, and the run would not end as one never stopped "
                f"({remedy.format(then)} goes on)"
            )


def check_same_data(path: Path, saved: dict[str, Any], data: dict[str, Any]) -> None:
    """Refuse to go on from `path` with other images than it was trained on."""
    theirs = saved["data"]
    changed = [name for name in data if theirs.get(name, data[name]) != data[name]]
    if changed:
        raise UserError(
            f"cannot resume {path}: the images are not those that it was trained on (another "
            f"{', '.join(changed)}); --init_from {path} starts a new run from its encoder"
        )


def _steps_saved(folder: Path) -> list[int]:
    prefix, suffix = STEP.split("{}")
    names = [path.name[len(prefix) : -len(suffix)] for path in folder.glob(STEP.format("*"))]
    return sorted(int(name) for name in names if name.isdecimal())
