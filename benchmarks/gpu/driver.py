"""The training driver on the device: images a second beside a bare loop, and a run that is killed.

What is not installed (jsonargparse, kornia, webdataset) skips the stage.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from gpu.place import Items, Place, Row, Skipped
from measuring.machine import REPOSITORY

NEEDED = ("jsonargparse", "kornia", "webdataset", "timm", "safetensors", "sklearn")
STEPS, SAVE_EVERY = 50, 10
ROUNDS = 3


def items(place: Place) -> Items:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"not installed: {', '.join(missing)} (--wheels DIR brings them)")
    found: Items = {"killed and resumed": functools.partial(_killed_and_resumed, place)}
    if not place.is_tiny:  # test_bench_train.py has its own rehearsal
        found["images a second"] = functools.partial(_images_per_second, place)
    return found


def _data(place: Place) -> list[str]:
    return ["fashion_mnist", "--data_root", place.data_root] if place.data_root else ["digits"]


def _killed_and_resumed(place: Place) -> Iterator[Row]:
    """A run killed behind its first checkpoints ends, resumed, like one that nothing happened to."""
    with tempfile.TemporaryDirectory() as folder:
        whole = None if place.is_tiny else _start(place, folder, "whole")
        try:
            saved = Path(folder) / "killed" / "last.pt"
            begun_at = _kill_behind(saved, _start(place, folder, "killed"))
            resumed = _start(place, folder, "killed", "--resume", "auto")
            for process in filter(None, (resumed, whole)):
                assert process.wait() == 0, f"pretrain.py ended with exit code {process.returncode}"
        finally:
            if whole:  # what is measured next has the device for itself
                _kill(whole)
        row: Row = {"killed_after_step": begun_at, "resumed_to_step": _step_of(saved)}
        if whole:
            mine, other = _weights(saved), _weights(Path(folder) / "whole" / "last.pt")
            differences = [(mine[name] - other[name]).abs().max().item() for name in other]
            row |= {"largest_difference": max(differences)}
        yield row


def _kill_behind(saved: Path, run: subprocess.Popen[bytes]) -> int:
    """Kill a run once it has saved a checkpoint; answer with the checkpoint's step."""
    while not saved.exists() and run.poll() is None:
        time.sleep(0.05)
    _kill(run)
    assert saved.exists(), "the run ended before its first checkpoint"
    return _step_of(saved)


def _kill(run: subprocess.Popen[bytes]) -> None:
    run.kill()
    run.wait()


def _start(place: Place, folder: str, name: str, *more: str) -> subprocess.Popen[bytes]:
    steps, save_every = (6, 2) if place.is_tiny else (STEPS, SAVE_EVERY)
    small = ["--model", "resnet10", "--width", "4", "--image_size", "8"] if place.is_tiny else []
    command = [
        sys.executable,
        str(REPOSITORY / "train" / "pretrain.py"),
        "--dataset",
        *_data(place),
    ]
    command += ["--device", place.device, "--precision", "bf16", "--max_steps", str(steps)]
    command += ["--deterministic"]
    command += ["--save_every", str(save_every), "--warmup_epochs", "0", "--knn_every", "0"]
    command += ["--output_dir", folder, "--name", name, *small, *more]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL)


def _step_of(checkpoint: Path) -> int:
    step: int = torch.load(checkpoint, map_location="cpu")["state"]["step"]
    return step


def _weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    saved = torch.load(checkpoint, map_location="cpu")["model"]
    return {name: x.float() for name, x in saved.items()}


def _images_per_second(place: Place) -> Iterator[Row]:
    """bench_train.py: beside a bare loop and SupContrast's way; then in bf16, compiled, and both."""
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "bench_train.py")]
    command += ["--device", place.device, "--model", "resnet18", "--width", "64"]
    command += ["--image-sizes", "28" if place.data_root else "8"]
    command += ["--steps", str(STEPS), "--rounds", str(ROUNDS)]
    if place.data_root:
        command += ["--data-root", place.data_root]
    # SupContrast's way waits for its workers: a few steps tell.
    beside = ["--steps", "20", "--workers", "8"]
    for name, options in (("train", beside), ("train_options", ["--options"])):
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([*command, *options, "--output-dir", folder], check=True)
            with (Path(folder) / f"{name}_{place.device}.csv").open(newline="") as file:
                yield from csv.DictReader(file)
