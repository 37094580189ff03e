"""Checkpoints: written so that a crash leaves the old file whole, read without running code."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import torch

from config import PretrainConfig, UserError

# A run may be moved, renamed or given other workers and go on; every other option shapes it.
FREE_OPTIONS = {"data_root", "workers", "device", "output_dir", "name", "resume"}


@dataclass
class RunState:
    """How far a run has come: whole epochs, steps, and k-NN accuracies (shares of 1)."""

    raw_pixels: float
    untrained: float
    accuracy: float
    epoch: int = 0
    step: int = 0


def save_checkpoint(path: Path, **state: Any) -> None:
    """Write the state of a run, whole or not at all."""
    replace_file(path, lambda file: torch.save(state, file))


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace `path` in one step, once every byte of the new file is on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU.

    Raises:
        UserError: there is none, it is not one of ours, or another version wrote it.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} is not a readable checkpoint: {error}") from error
    if not isinstance(state, dict) or "config" not in state or "model" not in state:
        raise UserError(f"{path} was not written by pretrain.py")
    ours, theirs = {field.name for field in fields(PretrainConfig)}, set(state["config"])
    if ours != theirs:
        raise UserError(
            f"{path} was written by another version of pretrain.py; options unknown to this one: "
            f"{_listed(theirs - ours)}; missing: {_listed(ours - theirs)}"
        )
    return state


def check_same_run(config: PretrainConfig, saved: dict[str, Any], path: Path) -> None:
    """Refuse to go on with options other than those that the checkpoint was trained with."""
    ours = asdict(config)
    changed = [
        f"--{option} is {ours[option]}, was {saved.get(option)}"
        for option in ours
        if option not in FREE_OPTIONS and ours[option] != saved.get(option)
    ]
    if changed:
        raise UserError(
            f"cannot resume {path} with other options: {'; '.join(changed)} "
            f"(--config {path.parent / 'config.yaml'} repeats them)"
        )


def _listed(options: set[str]) -> str:
    return ", ".join(sorted(options)) or "none"


def _sync_folder(folder: Path) -> None:
    # The rename itself is only safe against a power cut once its folder is synced; not every
    # system can open a folder.
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
