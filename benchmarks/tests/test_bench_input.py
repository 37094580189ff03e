"""The benchmark of the loaders on a few images: that it runs, and what its rows say."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

import bench_input


# timm leaves the files of images open until they are collected.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_writes_a_row_for_every_loader(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    small = ["--images", "8", "--image-size", "16", "--batch-size", "4"]
    short = ["--batches", "1", "--rounds", "1", "--output-dir", str(tmp_path)]
    assert bench_input.main([*small, *short]) == 0
    torch.set_num_threads(threads)
    with open(tmp_path / "input_cpu.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["loader"], row["views"]) for row in rows] == [
        ("driver", "1"), ("timm", "1"), ("torchvision", "1"), ("driver", "2"), ("torchvision", "2")
    ]  # fmt: skip
    assert all(float(row["images_per_second_per_core"]) > 0 for row in rows)
    assert rows[0]["over_timm"] and not rows[3]["over_timm"]
