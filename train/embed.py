"""Embed a folder of images with the encoder of a run.

python train/embed.py --checkpoint runs/NAME/last.pt --images FOLDER --output embeddings.npz

The file holds what numpy.load reads: `embeddings`, (N, D) float32, not normalised; `paths`, (N,),
below FOLDER; and where FOLDER holds a folder per class `labels`, (N,), and `classes`, their names.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import is_image_file

from data.images import ImageFiles, Split
from data.sources import load_data
from data.views import Views
from evaluation.embeddings import embed, encode_stored
from network.weights import load_model
from run.atomic_write import replace_file
from run.checkpoint import LAST, load_checkpoint
from run.command_line import parse, run_script
from run.config import EmbedConfig, PretrainConfig
from run.device import pick_device
from run.errors import UserError

DESCRIPTION = (__doc__ or "").split("\n", 1)[0]


def main(argv: list[str] | None = None) -> Path:
    """Run what the command line asks for; returns the file written."""
    config = parse(EmbedConfig, argv, prog="train/embed.py", description=DESCRIPTION)
    return embed_folder(config)


def embed_folder(config: EmbedConfig) -> Path:
    """Embed every image of a folder as the evaluation of the run would, and write the file."""
    path = _file(Path(config.checkpoint))
    saved = load_checkpoint(path)
    device = pick_device(config.device)
    run, about = PretrainConfig(**saved["config"]), saved["data"]
    if about.get("stored_size") is None:
        # Of an older checkpoint the data set of its run knows how an image is made its input.
        data = load_data(run, fetch=False)
        about |= {"stored_size": data.train.stored_size, "mean": data.mean, "std": data.std}
    found, classes = find_images(Path(config.images))
    split = Split(
        ImageFiles(list(found), about["stored_size"], about["channels"]),
        torch.tensor(list(found.values())),
    )

    model = load_model(path, saved)
    model = model.to(device).to(memory_format=run.memory_format)
    assert run.image_size is not None
    views = Views(
        nn.Identity(),
        image_size=run.image_size,
        mean=about["mean"],
        std=about["std"],
        seed=0,
        memory_format=run.memory_format,
    )
    encode = partial(encode_stored, model, views)
    embeddings = embed(encode, split, device=device, workers=config.workers).float().cpu()

    arrays = {
        "embeddings": embeddings.numpy(),
        "paths": np.array([Path(path).relative_to(config.images).as_posix() for path in found]),
    }
    if classes:
        arrays |= {"labels": split.labels.numpy(), "classes": np.array(classes)}
    output = Path(config.output)
    try:
        replace_file(output, lambda file: np.savez(file, **arrays))
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error}") from error
    print(f"{len(embeddings)} embeddings of {embeddings.shape[1]} numbers written to {output}")
    return output


def find_images(folder: Path) -> tuple[dict[str, int], list[str]]:
    """The images of a folder in order, each with its label, and the classes.

    Of images that lie in the folder itself every label is 0 and there is no class.

    Raises:
        UserError: there is no folder, no image, an empty class, or images beside class folders.
    """
    if not folder.is_dir():
        raise UserError(f"--images: there is no folder {folder}")
    entries = sorted(folder.iterdir())
    images = [str(path) for path in entries if path.is_file() and is_image_file(path.name)]
    has_folders = any(path.is_dir() for path in entries)
    if images and has_folders:
        raise UserError(f"--images {folder} holds images beside folders: give one or the other")
    if images:
        return dict.fromkeys(images, 0), []
    if not has_folders:
        raise UserError(f"--images {folder} holds no image")
    try:
        classed = ImageFolder(folder)
    except FileNotFoundError as error:
        raise UserError(f"--images {folder}: {error}") from error
    return dict(classed.samples), classed.classes


def _file(checkpoint: Path) -> Path:
    return checkpoint / LAST if checkpoint.is_dir() else checkpoint


if __name__ == "__main__":
    run_script(main)
