"""What the tests of train/ share: its modules on the path, short runs, and small image files."""

import csv
import io
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from webdataset import TarWriter

TRAIN = Path(__file__).resolve().parent.parent / "train"
if str(TRAIN) not in sys.path:
    sys.path.insert(0, str(TRAIN))

# A network small enough that a run of a few steps takes a second.
TINY = ["--model=resnet10", "--width=4", "--image_size=8", "--warmup_epochs=0", "--device=cpu"]


def pretrain(output_dir: Path, *options: object) -> Path:
    """Run pretrain.py in this process; returns the folder of the run."""
    from pretrain import main

    return main([*TINY, "--output_dir", str(output_dir), *map(str, options)])


def metrics(run: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv."""
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The weights in a run's last checkpoint."""
    return torch.load(run / "last.pt", weights_only=True)["model"]


def write_images(folder: Path, counts: dict[str, int], *, size: tuple[int, int] = (20, 16)) -> None:
    """Write PNG images, a folder per class, whose colour depends on the class."""
    rng = np.random.default_rng(0)
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            (folder / name / f"{index}.png").write_bytes(_png(number, size, rng))


def write_shards(
    folder: Path, sizes: list[int], *, labels: tuple[int, ...] = (0, 1), name: str = "train"
) -> str:
    """Write shards of so many images each, whose labels take turns; returns their path in braces.

    The colour of an image depends on its label's place among `labels`.
    """
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for shard, size in enumerate(sizes):
        with TarWriter(str(folder / f"{name}-{shard}.tar")) as tar:
            for index in range(size):
                number = index % len(labels)
                image = _png(number, (20, 16), rng)
                key = f"{shard}/{index:03}"
                tar.write({"__key__": key, "png": image, "cls": labels[number]})
    return f"{folder}/{name}-{{0..{len(sizes) - 1}}}.tar"


def _png(number: int, size: tuple[int, int], rng: np.random.Generator) -> bytes:
    pixels = rng.integers(0, 120, (*size, 3)) + np.array([60 * number, 0, 90])
    packed = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(packed, "png")
    return packed.getvalue()
