"""Embed a folder of images with the encoder of a run.

python train/embed.py --checkpoint runs/NAME/last.pt --images FOLDER --output embeddings.npz

The file holds what numpy.load reads: `embeddings`, (N, D) float32, not normalised; `paths`, (N,),
below FOLDER; and where FOLDER holds a folder per class `labels`, (N,), and `classes`, their names.
"""

import run.quiet_interrupt  # noqa: F401  before all that takes long to import

# isort: split

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.datasets.folder import is_image_file

from data.folders import ClassFolders
from data.images import ImageFiles, Split
from data.views import Views
from evaluation.embeddings import embed, encode_stored
from run import next_steps
from run.atomic_write import replace_file
from run.command_line import parse, run_script
from run.device import Device, pick_device, set_arithmetic
from run.errors import UserError
from run.rules import broken, out_of_range
from run.saved_run import open_run

DESCRIPTION = (__doc__ or "").split("\n", 1)[0]


@dataclass
class EmbedOptions:
    """Embedding a folder of images.

    Args:
        checkpoint: A checkpoint of pretrain.py (last.pt, best.pt), or the folder of a run (its last.pt).
        images: A folder of images, or of a folder per class.
        output: The .npz file to write.
        workers: Processes that decode images.
        device: auto: cuda if available, then mps, then cpu.
    """

    checkpoint: str
    images: str
    output: str
    workers: int = 0
    device: Device = "auto"

    def mistakes(self) -> list[str]:
        """What is out of range, one sentence each."""
        output = Path(self.output)
        rules = [
            (output.suffix == ".npz", f"--output {output}: the name of a .npz file is needed"),
            (output.parent.is_dir(), f"--output {output}: there is no folder {output.parent}"),
        ]
        return broken(rules) + out_of_range(self, at_least={"workers": 0})


def main(argv: list[str] | None = None) -> Path:
    """Run what the command line asks for; returns the file written."""
    options = parse(EmbedOptions, argv, prog="train/embed.py", description=DESCRIPTION)
    return embed_folder(options)


def embed_folder(options: EmbedOptions) -> Path:
    """Embed every image of a folder as the evaluation of the run would, and write the file."""
    run = open_run(Path(options.checkpoint))
    device = pick_device(options.device)
    set_arithmetic(run.options.device, device)
    of_run, about = run.options, run.prepared_images()
    found, classes = find_images(Path(options.images))
    split = Split(
        ImageFiles(list(found), about["stored_size"], about["channels"]),
        torch.tensor(list(found.values())),
    )

    assert of_run.data.image_size is not None
    views = Views(
        nn.Identity(),
        image_size=of_run.data.image_size,
        mean=about["mean"],
        std=about["std"],
        seed=0,
        memory_format=of_run.network.memory_format,
    )
    encode = partial(encode_stored, run.network().to(device), views)
    embeddings = embed(encode, split, device=device, workers=options.workers).float().cpu()

    arrays: dict[str, Any] = {
        "embeddings": embeddings.numpy(),
        "paths": np.array([Path(path).relative_to(options.images).as_posix() for path in found]),
    }
    if classes:
        arrays |= {"labels": split.labels.numpy(), "classes": np.array(classes)}
    output = Path(options.output)
    try:
        replace_file(output, lambda file: np.savez(file, **arrays))
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error}") from error
    print(f"{len(embeddings)} embeddings of {embeddings.shape[1]} numbers written to {output}")
    following = next_steps.read(output), next_steps.export(Path(options.checkpoint))
    print(next_steps.lines(*following))
    return output


def find_images(folder: Path) -> tuple[dict[str, int], list[str]]:
    """The images of a folder in order, each with its label, and the classes.

    Of images that lie in the folder itself every label is 0 and there is no class.

    Raises:
        UserError: there is no folder, no image, an empty class, or images beside class folders.
    """
    if not folder.is_dir():
        raise UserError(f"--images: there is no folder {folder}")
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    images = [str(path) for path in entries if path.is_file() and is_image_file(path.name)]
    has_folders = any(path.is_dir() for path in entries)
    if images and has_folders:
        raise UserError(f"--images {folder} holds images beside folders: give one or the other")
    if images:
        return dict.fromkeys(images, 0), []
    if not has_folders:
        raise UserError(f"--images {folder} holds no image")
    try:
        classed = ClassFolders(folder)
    except FileNotFoundError as error:
        raise UserError(f"--images {folder}: {error}") from error
    return dict(classed.samples), classed.classes


if __name__ == "__main__":
    run_script(main)
