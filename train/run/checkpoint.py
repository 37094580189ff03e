"""Checkpoints: what they hold, which of them stay, and how one is verified before it is used.

A run's folder holds step-N.pt for the last steps saved, last.pt as another name of the newest, and
best.pt of the best k-NN accuracy, where there are validation images to choose by. last.pt is made
last: until then the one before is the newest.
"""

import io
import math
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from run.atomic_write import TEMPORARY, link_file, replace_file
from run.config import PretrainConfig
from run.errors import UserError
from run.out_of_memory import is_out_of_memory

LAST = "last.pt"
BEST = "best.pt"
STEP = "step-{}.pt"
ZIP = b"PK\x03\x04"
# A run may be moved, renamed, become longer or shorter, or be evaluated and saved at other steps; every
# other option has shaped the steps that it has made.
FREE_OPTIONS = {
    "data_root", "epochs", "max_steps", "workers", "device", "timeout_minutes", "knn_every",
    "save_every", "keep", "output_dir", "name", "resume",
}  # fmt: skip
# Where images are, which may have moved.
PLACES = {"dataset", "val_shards"}


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


# The parts besides options and tensors. What may be None an older checkpoint may lack.
CONTENTS: dict[str, dict[str, Any]] = {
    "state": get_type_hints(RunState),
    "machine": {"world_size": int, "threads": int | None},
    "data": {
        "classes": list[str],
        "channels": Literal[1, 3],
        "num_images": int | None,
        "stored_size": int | None,
        "mean": list[float] | None,
        "std": list[float] | None,
        "views": list[str] | None,
        "order": str | None,
    },
}


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


def load_newest(
    paths: Sequence[Path], restore: Callable[[Path, dict[str, Any]], object]
) -> dict[str, Any]:
    """Read the first of several checkpoints that is whole, and warn of those before it.

    Args:
        restore: called with a checkpoint that was read, to go on from it; one that it finds damaged
            is not whole.

    Raises:
        UserError: none is whole, or the first that is was not written by this version.
    """
    for path in paths:
        try:
            saved = load_checkpoint(path)
            restore(path, saved)
            return saved
        except DamagedCheckpoint as damage:
            if path == paths[-1]:
                raise
            print(f"warning: {damage}; the one before it is tried", file=sys.stderr)
    raise AssertionError("there is no path")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU, without running code from it, once its checksums hold.

    Raises:
        UserError: there is none, it is damaged, it is not one of ours, or another version wrote it.
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
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        _raise_if_of_machine(path, error)
        raise DamagedCheckpoint(f"{path} is not a readable checkpoint: {error}") from error
    if not isinstance(saved, dict) or "config" not in saved or "model" not in saved:
        raise UserError(f"{path} was not written by pretrain.py")
    if not isinstance(saved["config"], dict):
        raise DamagedCheckpoint(f"{path} is damaged: its config is {_said(saved['config'])}")
    known = asdict(PretrainConfig())
    if unknown := saved["config"].keys() - known.keys():
        raise UserError(
            f"{path} was written by another version of pretrain.py; options unknown to this one: "
            f"{', '.join(sorted(map(str, unknown)))}"
        )
    # Without an option a run was what the default of that option makes it.
    saved["config"] = known | saved["config"]
    with restored_from(path):
        _check_contents(saved)
    return saved


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


def _check_contents(saved: dict[str, Any]) -> None:
    """Raise ValueError, or KeyError, for what no run of pretrain.py has saved."""
    _check_fields("config", saved["config"], get_type_hints(PretrainConfig))
    if mistakes := PretrainConfig(**saved["config"]).mistakes():
        raise ValueError(f"its config says {'; '.join(mistakes)}")
    for part, kinds in CONTENTS.items():
        _check_fields(part, saved[part], kinds)
    for count in ("epoch", "step", "skipped"):
        if saved["state"].get(count, 0) < 0:
            raise ValueError(f"its {count} is {saved['state'][count]}")
    if saved["config"]["image_size"] is None:
        raise ValueError("its config has no image_size")
    for name in ("mean", "std"):
        values = saved["data"].get(name)
        if values is not None and len(values) != saved["data"]["channels"]:
            raise ValueError(f"its data has {len(values)} numbers for {name}")
    for part in ("model", "ema"):
        weights = saved.get(part)
        tensors = isinstance(weights, dict) and all(isinstance(w, Tensor) for w in weights.values())
        if not (weights and tensors) and (part, weights) != ("ema", None):
            raise ValueError(f"its {part} holds no weights")
    for part in ("model", "ema", "memory", "probe", "optimizer"):
        check_finite(saved.get(part), part)
    # Of every process, each of which will take its own.
    states = saved.get("random_states") or [saved.get("random_state")]
    if len(states) != (count := saved["machine"]["world_size"]):
        raise ValueError(f"its random_states are {len(states)}, not one for each of {count}")
    for state in saved.get("random_states") or []:
        torch.Generator().set_state(state["cpu"])


def _check_fields(part: str, found: object, kinds: dict[str, Any]) -> None:
    """Refuse what is no dictionary of fields of these kinds; that a kind is Optional lets it lack."""
    if not isinstance(found, dict):
        raise ValueError(f"its {part} is {_said(found)}")
    for name, kind in kinds.items():
        if name not in found and not _is_of(None, kind) and not hasattr(RunState, name):
            raise ValueError(f"its {part} has no {name}")
        if name in found and not _is_of(found[name], kind):
            raise ValueError(f"its {part} has {_said(found[name])} for {name}")


def _is_of(value: object, kind: Any) -> bool:
    """Whether a value is of a type, a union, a Literal or a list of those."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Literal:
        return type(value) in (int, str) and value in inside
    if origin is list:
        return isinstance(value, list) and all(_is_of(part, inside[0]) for part in value)
    if inside:
        return any(_is_of(value, one) for one in inside)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind


def _said(value: object) -> str:
    return f"{type(value).__name__} {shorten(str(value), 40)}"


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
        if option not in PLACES or _kind_of(ours[option]) != _kind_of(theirs[option])
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
        now, then = machine[name], saved["machine"].get(name)
        # Either is None where the run moved from or to another kind of device.
        if now is not None and then is not None and now != then:
            raise UserError(
                f"cannot resume {path} with {now} {kind}, it was trained with {then}: sums taken in "
                f"another order round differently, and the run would not end as one never stopped "
                f"({remedy.format(then)} goes on)"
            )


def _kind_of(place: str | None) -> str | None:
    """Of a data set in files what remains where it moves."""
    kind, colon, _ = (place or "").partition(":")
    return kind if colon and kind in ("imagefolder", "webdataset") else place


def check_same_data(path: Path, saved: dict[str, Any], data: dict[str, Any]) -> None:
    """Refuse to go on from `path` with other images than it was trained on."""
    theirs = saved["data"]
    # An older checkpoint says nothing of its views: they had none of these traits.
    if traits := sorted(set(data["views"]) ^ set(theirs.get("views") or [])):
        raise UserError(
            f"cannot resume {path}: its random views were made in another way than by this version "
            f"({', '.join(traits)}); --init_from {path} starts a new run from its encoder"
        )
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
