"""The weights of an encoder in files: where a run takes its first ones from and leaves its last."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from data.images import ImageData
from network.embedder import Embedder, build_model, encoder_recipe
from run.atomic_write import link_file, replace_file, replace_text
from run.checkpoint import (
    LAST,
    check_finite,
    evaluated_weights,
    load_checkpoint,
    load_weights,
    restored_from,
)
from run.config import PretrainConfig
from run.errors import UserError

PREFIX = "encoder."
ENCODER = "encoder.safetensors"
EXPORT = "export"
METADATA = "encoder"


def load_first_weights(encoder: nn.Module, config: PretrainConfig, *, channels: int) -> None:
    """Give a new run's encoder the weights that --pretrained or --init_from names, if any.

    Raises:
        UserError: they cannot be had, or are those of another model.
    """
    name, options = encoder_recipe(config, channels=channels)
    if config.pretrained:
        try:
            trained = timm.create_model(name, pretrained=True, **options)
        except Exception as error:
            raise UserError(
                f"--pretrained: timm's weights for --model {name} could not be had "
                f"({' '.join(str(error).split())}); where there is no network, start without "
                "them or from a file by --init_from"
            ) from error
        encoder.load_state_dict(trained.state_dict())
    if config.init_from is not None:
        theirs, weights = read_encoder(Path(config.init_from))
        ours = {"model": name, **options}
        if differences := [
            f"{key} is {theirs.get(key)}, here {ours.get(key)}"
            for key in ours | theirs
            if ours.get(key) != theirs.get(key)
        ]:
            raise UserError(
                f"--init_from {config.init_from} holds another model: {', '.join(differences)}"
            )
        load_weights(encoder, weights, Path(config.init_from))


def read_encoder(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the encoder of a run from a checkpoint, its encoder.safetensors or its folder.

    Returns:
        The arguments of timm.create_model that build it, and its weights.

    Raises:
        UserError: there is no such file, it cannot be read, or pretrain.py did not write it.
    """
    path = path / LAST if path.is_dir() else path
    if path.suffix != ".safetensors":
        saved = load_checkpoint(path)
        config = PretrainConfig(**saved["config"])
        name, options = encoder_recipe(config, channels=saved["data"]["channels"])
        weights = {
            key.removeprefix(PREFIX): value
            for key, value in evaluated_weights(saved).items()
            if key.startswith(PREFIX)
        }
        return {"model": name, **options}, weights
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


def load_model(path: Path, saved: dict[str, Any]) -> Embedder:
    """The network whose weights a checkpoint, read from `path`, would have evaluated.

    Raises:
        UserError: the checkpoint does not hold such a network.
    """
    with restored_from(path):
        model = build_model(PretrainConfig(**saved["config"]), channels=saved["data"]["channels"])
    load_weights(model, evaluated_weights(saved), path)
    return model


def write_encoder(
    folder: Path, encoder: nn.Module, config: PretrainConfig, data: ImageData
) -> None:
    """Write encoder.safetensors, and export/ for `timm.create_model("local-dir:.../export")`.

    Either says from what arguments timm builds the encoder and how an image is made its input. A
    small stem is built after `import supcon_kernels.small_stem`.
    """
    name, options = encoder_recipe(
        replace(config, image_size=data.image_size), channels=data.channels
    )
    about = {
        "model": name,
        "options": options,
        "image_size": data.image_size,
        "mean": data.mean,
        "std": data.std,
    }
    packed = pack_encoder(encoder.state_dict(), about)
    replace_file(folder / ENCODER, lambda file: file.write(packed))

    export = folder / EXPORT
    export.mkdir(exist_ok=True)
    link_file(folder / ENCODER, export / "model.safetensors")
    replace_text(export / "config.json", json.dumps(_timm_config(encoder, name, options, data)))


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
    encoder: nn.Module, name: str, options: dict[str, Any], data: ImageData
) -> dict[str, Any]:
    of_model: Any = encoder.pretrained_cfg
    # Whoever gives it a number of classes again needs the names of the layers that change.
    kept = {key: of_model[key] for key in ("first_conv", "classifier") if of_model.get(key)}
    return {
        "architecture": name.partition(".")[0],
        "num_classes": options["num_classes"],
        "num_features": encoder.num_features,
        "model_args": options,
        "pretrained_cfg": kept
        | {
            "num_classes": options["num_classes"],
            "input_size": [data.channels, data.image_size, data.image_size],
            "fixed_input_size": bool(of_model.get("fixed_input_size")),
            "interpolation": "bilinear",
            "crop_pct": data.image_size / data.train.stored_size,
            "crop_mode": "center",
            "mean": data.mean,
            "std": data.std,
        },
    }
