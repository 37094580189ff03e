"""The weights of an encoder in files: where a run takes its first ones from and leaves its last."""

import json
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from data.images import ImageData
from network.embedder import NetworkOptions, encoder_recipe
from run.atomic_write import link_file, replace_file, replace_text
from run.checkpoint import check_finite, restored_from
from run.errors import UserError
from run.rules import broken

PREFIX = "encoder."
ENCODER = "encoder.safetensors"
EXPORT = "export"
METADATA = "encoder"


@dataclass
class StartOptions:
    """The weights to start from.

    Args:
        pretrained: Start from timm's weights of the model, which are downloaded (standard stem
            only).
        init_from: Start from the encoder of another run with the same model. A checkpoint, an
            encoder.safetensors, the folder of a run (its last.pt), or a file from convert.py.
    """

    pretrained: bool = False
    init_from: str | None = None

    def mistakes(self) -> list[str]:
        """What contradicts itself, one sentence each."""
        rules = [
            (
                self.init_from is None or not self.pretrained,
                "--pretrained contradicts --init_from: the weights come from one of them",
            )
        ]
        return broken(rules)


def load_pretrained(encoder: nn.Module, about: dict[str, Any]) -> None:
    """Give an encoder timm's weights for it.

    Args:
        about: "model" and the other arguments of timm.create_model that build it.

    Raises:
        UserError: they cannot be had.
    """
    arguments = dict(about)
    name = arguments.pop("model")
    try:
        trained = timm.create_model(name, pretrained=True, **arguments)
    except Exception as error:
        raise UserError(
            f"--pretrained: cannot get timm's weights for --model {name} "
            f"({' '.join(str(error).split())}); without a network connection, leave the option out "
            "or use a file by --init_from"
        ) from error
    encoder.load_state_dict(trained.state_dict())


def load_encoder(
    encoder: nn.Module,
    about: dict[str, Any],
    found: tuple[dict[str, Any], dict[str, Tensor]],
    path: Path,
) -> None:
    """Give an encoder the weights that were found in `path`, if they are those of its model.

    Args:
        about: the arguments of timm.create_model that build it.
        found: the same of the other encoder, and its weights.

    Raises:
        UserError: they are those of another model.
    """
    theirs, weights = found
    if differences := [
        f"{key} is {theirs.get(key)}, here {about.get(key)}"
        for key in about | theirs
        if about.get(key) != theirs.get(key)
    ]:
        raise UserError(f"--init_from {path} holds another model: {', '.join(differences)}")
    load_weights(encoder, weights, path)


def read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read encoder.safetensors: the arguments of timm.create_model that build it, and its weights.

    Raises:
        UserError: there is no such file, it cannot be read, or pretrain.py did not write it.
    """
    if not path.is_file():
        raise UserError(f"there is no encoder {path}")
    try:
        with safe_open(path, "pt") as file:
            about = _read_metadata(file.metadata() or {})
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"cannot read the encoder {path}: {error}") from error
    if "model" not in about or "options" not in about:
        raise UserError(f"{path} was not written by pretrain.py")
    with restored_from(path):
        check_finite(weights)
        return {"model": about["model"], **about["options"]}, weights


def _read_metadata(metadata: dict[str, str]) -> dict[str, Any]:
    """What encoder.safetensors says of its encoder; {} if pretrain.py did not write it."""
    if METADATA in metadata:
        about = json.loads(metadata[METADATA])
        return about if isinstance(about, dict) else {}
    # Older files have a key for each value, which is JSON but for the name.
    if "model" in metadata and "options" in metadata:
        return {"model": metadata["model"], "options": json.loads(metadata["options"])}
    return {}


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


def write_encoder(
    folder: Path, encoder: nn.Module, options: NetworkOptions, data: ImageData
) -> None:
    """Write encoder.safetensors, and export/ for `timm.create_model("local-dir:.../export")`.

    Either says from what arguments timm builds the encoder and how an image is made its input. A
    small stem is built after `import supcon_kernels.small_stem`.
    """
    name, arguments = encoder_recipe(options, channels=data.channels, image_size=data.image_size)
    about = {
        "model": name,
        "options": arguments,
        "image_size": data.image_size,
        "mean": data.mean,
        "std": data.std,
    }
    packed = pack_encoder(encoder.state_dict(), about)
    replace_file(folder / ENCODER, lambda file: file.write(packed))

    export = folder / EXPORT
    export.mkdir(exist_ok=True)
    link_file(folder / ENCODER, export / "model.safetensors")
    replace_text(export / "config.json", json.dumps(_timm_config(encoder, name, arguments, data)))


def pack_encoder(weights: dict[str, Tensor], about: dict[str, Any]) -> bytes:
    """The contents of encoder.safetensors, which `read_encoder` reads.

    Args:
        about: "model" and "options", from which timm.create_model builds it, and what else is to be
            said of it.
    """
    # Copies: safetensors takes no weights of which two layers share the memory.
    copies = {
        key: value.clone(memory_format=torch.contiguous_format) for key, value in weights.items()
    }
    # One key: safetensors writes several in random order, and equal runs are to write equal files.
    return save(copies, {METADATA: json.dumps({"format": "pt", **about}, sort_keys=True)})


def _timm_config(
    encoder: nn.Module, name: str, arguments: dict[str, Any], data: ImageData
) -> dict[str, Any]:
    of_model: Any = encoder.pretrained_cfg
    # Whoever gives it a number of classes again needs the names of the layers that change.
    kept = {key: of_model[key] for key in ("first_conv", "classifier") if of_model.get(key)}
    return {
        "architecture": name.partition(".")[0],
        "num_classes": arguments["num_classes"],
        "num_features": encoder.num_features,
        "model_args": arguments,
        "pretrained_cfg": kept
        | {
            "num_classes": arguments["num_classes"],
            "input_size": [data.channels, data.image_size, data.image_size],
            "fixed_input_size": bool(of_model.get("fixed_input_size")),
            "interpolation": "bilinear",
            "crop_pct": data.image_size / data.train.stored_size,
            "crop_mode": "center",
            "mean": data.mean,
            "std": data.std,
        },
    }
