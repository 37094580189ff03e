"""A saved run, opened from its checkpoint: its options, its state, its images and its network.

Whatever starts from a run opens it here: resuming, the linear stage, embedding, --init_from.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from data.sources import load_data
from network.embedder import Embedder, build_model, encoder_recipe
from network.weights import PREFIX, load_weights, read_safetensors
from run.checkpoint import (
    LAST,
    DamagedCheckpoint,
    RunState,
    check_finite,
    read_file,
    restored_from,
)
from run.errors import UserError
from run.options import PretrainOptions, option_types

# The parts of a checkpoint besides options and tensors. What may be None an older checkpoint may lack.
CONTENTS: dict[str, dict[str, Any]] = {
    "state": get_type_hints(RunState),
    "machine": {
        "world_size": int,
        "threads": int | None,
        "gpu": str | None,
        "torch": str | None,
        "cudnn": int | None,
    },
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


@dataclass
class SavedRun:
    """What a checkpoint holds of a run.

    Attributes:
        about_images: classes, channels, and how an image is made the network's input.
        content: all of it, as `save_checkpoint` wrote it.
    """

    path: Path
    content: dict[str, Any]

    @property
    def options(self) -> PretrainOptions:
        """Those of the run; one from before an option was there has the default of that option."""
        return PretrainOptions.from_flat(self.content["config"])

    @property
    def state(self) -> RunState:
        """How far the run had come."""
        return RunState(**self.content["state"])

    @property
    def about_images(self) -> dict[str, Any]:
        """What is said of the images that it was trained on."""
        about: dict[str, Any] = self.content["data"]
        return about

    def prepared_images(self) -> dict[str, Any]:
        """The same, with what an older checkpoint leaves to its data set: how an image is prepared."""
        about = dict(self.about_images)
        if about.get("stored_size") is None:
            options = self.options
            data = load_data(options.data, seed=options.seeds.seed, fetch=False)
            about |= {"stored_size": data.train.stored_size, "mean": data.mean, "std": data.std}
        return about

    @property
    def weights(self) -> dict[str, Tensor]:
        """Those that the run evaluates: their average where it keeps one."""
        average: dict[str, Tensor] | None = self.content.get("ema")
        weights: dict[str, Tensor] = self.content["model"]
        return weights if average is None else average

    def network(self) -> Embedder:
        """The network whose weights the run would have evaluated.

        Raises:
            UserError: the checkpoint does not hold such a network.
        """
        options = self.options
        with restored_from(self.path):
            model = build_model(
                options.network,
                channels=self.about_images["channels"],
                image_size=options.data.image_size,
            )
        load_weights(model, self.weights, self.path)
        return model

    def encoder(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The arguments of timm.create_model that build its encoder, and its weights."""
        name, arguments = encoder_recipe(
            self.options.network,
            channels=self.about_images["channels"],
            image_size=self.options.data.image_size,
        )
        weights = {
            key.removeprefix(PREFIX): value
            for key, value in self.weights.items()
            if key.startswith(PREFIX)
        }
        return {"model": name, **arguments}, weights


def open_run(path: Path) -> SavedRun:
    """Open a run by its checkpoint, or by its folder, whose last.pt it then is.

    Raises:
        UserError: there is none, it is damaged, it is not one of ours, or another version wrote it.
    """
    path = path / LAST if path.is_dir() else path
    saved = read_file(path)
    if not isinstance(saved, dict) or "config" not in saved or "model" not in saved:
        raise UserError(f"{path} was not written by pretrain.py")
    if not isinstance(saved["config"], dict):
        raise DamagedCheckpoint(f"{path} is damaged: its config is {_said(saved['config'])}")
    known = PretrainOptions().flat()
    if unknown := saved["config"].keys() - known.keys():
        raise UserError(
            f"{path} was written by another version of pretrain.py; options unknown to this one: "
            f"{', '.join(sorted(map(str, unknown)))}"
        )
    # Without an option a run was what the default of that option makes it.
    saved["config"] = known | saved["config"]
    with restored_from(path):
        _check_contents(saved)
    return SavedRun(path, saved)


def open_newest(paths: Sequence[Path], restore: Callable[[SavedRun], object]) -> SavedRun:
    """Open the first of several checkpoints that is whole, and warn of those before it.

    Args:
        restore: called with what was opened, to resume from it; a checkpoint that it finds damaged
            is not whole.

    Raises:
        UserError: none is whole, or the first that is was not written by this version.
    """
    for path in paths:
        try:
            saved = open_run(path)
            restore(saved)
            return saved
        except DamagedCheckpoint as damage:
            if path == paths[-1]:
                raise
            print(f"warning: {damage}; the one before it is tried", file=sys.stderr)
    raise AssertionError("there is no path")


def open_encoder(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the encoder of a run from a checkpoint, its encoder.safetensors or its folder.

    Returns:
        The arguments of timm.create_model that build it, and its weights.

    Raises:
        UserError: there is no such file, it cannot be read, or pretrain.py did not write it.
    """
    return read_safetensors(path) if path.suffix == ".safetensors" else open_run(path).encoder()


def _check_contents(saved: dict[str, Any]) -> None:
    """Raise ValueError, or KeyError, for what no run of pretrain.py has saved."""
    _check_fields("config", saved["config"], option_types())
    if mistakes := PretrainOptions.from_flat(saved["config"]).mistakes():
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
    for part in ("model", "ema", "method", "memory", "probe", "optimizer"):
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
        return isinstance(value, (int, float)) and type(value) is not bool and math.isfinite(value)
    return type(value) is kind


def _said(value: object) -> str:
    return f"{type(value).__name__} {shorten(str(value), 40)}"
