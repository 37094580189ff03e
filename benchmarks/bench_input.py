"""How many images one core reads, decodes and crops: the driver's loader beside timm's and torchvision's.

python benchmarks/bench_input.py writes input_cpu.csv. It makes JPEG images of ImageNet's size (500x400
pixels) in a temporary folder. The loaders take turns on the same files, with random crops of the same
areas to 224x224, as bytes; nothing else is changed in them:

driver       train/pretrain.py's batches
timm         timm.data.create_loader, without what it does to batches on the device
torchvision  ImageFolder, RandomResizedCrop and PILToTensor in a DataLoader

`views` is how many crops are cut from an image that is decoded once; timm's loader cuts one. A worker is
one process, so each loader runs in this one, and its time is that of the processor: images/s per core.

What a GPU needs is --views times the images/s at which it trains (bench_train.py --device cuda).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.dataset_factory import create_dataset
from timm.data.loader import create_loader
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from measuring.machine import REPOSITORY, describe_machine
from reporting.rows import add_output_options, results_path, write_table

sys.path.insert(0, str(REPOSITORY / "train"))

from data.batches import training_batches
from data.sources import load_data
from data.views import training_images
from run.options import PretrainOptions

WIDTH, HEIGHT, QUALITY = 500, 400, 90
MIN_AREA = 0.2
NUM_CLASSES = 2


def write_images(folder: Path, count: int) -> None:
    """Write smooth noise with some grain, about as many bytes a pixel as photographs have."""
    rng = np.random.default_rng(0)
    for number in range(count):
        place = folder / str(number % NUM_CLASSES)
        place.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8)
        smooth = np.asarray(
            Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        )
        grain = rng.integers(-12, 13, smooth.shape, dtype=np.int16)
        pixels = (smooth + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.jpg", quality=QUALITY)


def driver_batches(folder: Path, size: int, batch_size: int, views: int) -> Iterator[Any]:
    options = PretrainOptions.from_flat(
        {
            "dataset": f"imagefolder:{folder}", "val_fraction": 1e-6, "image_size": size,
            "num_views": views, "min_crop_area": MIN_AREA, "augment": "crop_flip",
            "batch_size": batch_size,
        }
    )  # fmt: skip
    split = training_images(options.views, load_data(options.data, seed=0), seed=0)
    order, batches = training_batches(split, options.batches, seed=0)
    while True:
        yield from batches
        order.begin(order.epoch + 1)


def timm_batches(folder: Path, size: int, batch_size: int) -> Iterator[Any]:
    loader = create_loader(
        create_dataset("", str(folder), split="train"),
        input_size=(3, size, size),
        batch_size=batch_size,
        is_training=True,
        scale=(MIN_AREA, 1.0),
        hflip=0.0,
        color_jitter=0.0,
        interpolation="bilinear",
        num_workers=0,
        persistent_workers=False,
        device=torch.device("cpu"),
    )
    while True:
        yield from loader.loader  # what it would copy to the device


class Crops:
    """So many crops of an image, as SupContrast's TwoCropTransform cuts two."""

    def __init__(self, size: int, views: int) -> None:
        crop = transforms.RandomResizedCrop(size, scale=(MIN_AREA, 1.0))
        self.transform = transforms.Compose([crop, transforms.PILToTensor()])
        self.views = views

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.stack([self.transform(image) for _ in range(self.views)])


def torchvision_batches(folder: Path, size: int, batch_size: int, views: int) -> Iterator[Any]:
    data = ImageFolder(folder, Crops(size, views))
    loader = DataLoader(data, batch_size=batch_size, shuffle=True, drop_last=True)
    while True:
        yield from loader


def images_per_second(loader: Iterator[Any], num_batches: int, batch_size: int) -> float:
    """Of this process's time on a processor."""
    began = time.process_time()
    for _ in islice(loader, num_batches):
        pass
    return num_batches * batch_size / (time.process_time() - began)


def rows_of(rates: dict[tuple[str, int], list[float]]) -> list[dict[str, object]]:
    """A row for each loader, and how it compares in the same rounds with one that it stands beside."""
    rows = []
    for (name, views), each in rates.items():
        over = {
            other: f"{median(a / b for a, b in zip(each, rates[other, views])):.3f}"
            if (other, views) in rates
            else ""
            for other in ("timm", "torchvision")
        }
        rows.append(
            {"loader": name, "views": views, "images_per_second_per_core": median(each)}
            | {"slowest": min(each), "fastest": max(each)}
            | {f"over_{other}": ratio for other, ratio in over.items()}
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=2000, help="files to make")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=4, help="of a round")
    parser.add_argument("--rounds", type=int, default=7)
    add_output_options(parser)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # as in a worker
    machine = describe_machine("cpu")
    size, batch_size = options.image_size, options.batch_size
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, options.images)
        file_kb = sum(file.stat().st_size for file in folder.rglob("*.jpg")) / options.images / 1e3
        loaders = {
            ("driver", 1): driver_batches(folder, size, batch_size, 1),
            ("timm", 1): timm_batches(folder, size, batch_size),
            ("torchvision", 1): torchvision_batches(folder, size, batch_size, 1),
            ("driver", 2): driver_batches(folder, size, batch_size, 2),
            ("torchvision", 2): torchvision_batches(folder, size, batch_size, 2),
        }
        rates: dict[tuple[str, int], list[float]] = {key: [] for key in loaders}
        for loader in loaders.values():
            next(loader)
        for _ in range(options.rounds):
            for key, loader in loaders.items():
                rates[key].append(images_per_second(loader, options.batches, batch_size))
    about: dict[str, object] = {
        "image_size": size,
        "file_kb": file_kb,
        "num_images": options.images,
    }
    about |= {"batch_size": batch_size, "batches_per_round": options.batches}
    about |= {"num_rounds": options.rounds}
    rows = rows_of(rates)
    for row in rows:
        rate = row["images_per_second_per_core"]
        print(f"{row['loader']:12} {row['views']} views  {rate:6.0f} images/s per core")
    path = results_path("input_cpu.csv", options.output_dir, options.update)
    write_table(path, [row | about | machine for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
