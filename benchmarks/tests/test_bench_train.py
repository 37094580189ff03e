"""The benchmarks of training on images of noise: that they run, and what their rows say."""

from __future__ import annotations

import csv
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bench_grad_cache
import bench_train
from pretend_cuda import pretend_cuda


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """Forty training and twenty test images of 28x28 in ten classes, as Fashion-MNIST's idx files."""
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 40), ("t10k", 20)):
        arrays = {
            "labels-idx1": np.arange(count, dtype=np.uint8) % 10,
            "images-idx3": rng.integers(0, 256, (count, 28, 28), dtype=np.uint8),
        }
        for kind, array in arrays.items():
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (tmp_path / f"{prefix}-{kind}-ubyte").write_bytes(header + array.tobytes())
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_writes_a_row_for_every_loop(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    torch.set_num_threads(1)
    small = ["--model", "resnet10", "--width", "4", "--image-sizes", "8", "--batch-size", "16"]
    short = ["--steps", "3", "--rounds", "2", "--workers", str(workers)]
    place = ["--data-root", str(data_root), "--output-dir", str(tmp_path / "results")]
    assert bench_train.main([*small, *short, *place]) == 0
    with open(tmp_path / "results" / "train_cpu.csv", newline="") as file:
        rows = {row["loop"]: row for row in csv.DictReader(file)}
    assert list(rows) == [
        "bare", "driver_crop_flip", "driver_simclr", "plain_crop_flip", "plain_simclr",
    ]  # fmt: skip
    assert rows["bare"]["over_bare"] == "1.0000"
    for name, row in rows.items():
        slowest, rate, fastest = (
            float(row[key]) for key in ("slowest", "images_per_second", "fastest")
        )
        assert 0 < slowest <= rate <= fastest
        assert (row["over_plain"] != "") == name.startswith("driver")
        assert row["torch"] == torch.__version__
    shares = [float(rows["driver_simclr"][f"{name}_share"]) for name in ("loss", "data", "views")]
    assert all(0 < share < 1 for share in shares)
    assert capsys.readouterr().out.count("driver_crop_flip: ") == 4


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")
def test_loops_train_on_a_gpu_and_are_waited_for_around_each_turn(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[str] = []
    for kind in (bench_train.Bare, bench_train.Driver, bench_train.Plain):

        def run(self: Any, num_steps: int, run: Any = kind.run) -> None:
            run(self, num_steps)
            assert next(getattr(self, "trainer", self).model.parameters()).is_cuda
            turns.append(type(self).__name__)

        monkeypatch.setattr(kind, "run", run)
    monkeypatch.setattr(bench_train, "set_arithmetic", lambda options, device: None)
    monkeypatch.setattr(bench_train, "describe_machine", lambda device: {"gpu": "none"})
    small = ["--model", "resnet10", "--width", "4", "--image-sizes", "8", "--batch-size", "16"]
    place = ["--data-root", str(data_root), "--output-dir", str(tmp_path), "--device", "cuda"]
    with pretend_cuda():
        monkeypatch.setattr("torch.cuda.synchronize", lambda *device: turns.append("wait"))
        monkeypatch.setattr("torch.cuda.Event.elapsed_time", lambda event, end: 1.0)
        short = ["--steps", "2", "--rounds", "1", "--workers", "0"]
        assert bench_train.main([*small, *short, *place]) == 0
    with open(tmp_path / "train_cuda.csv", newline="") as file:
        rows = {row["loop"]: row for row in csv.DictReader(file)}
    assert rows["driver_simclr"]["over_plain"] and rows["driver_simclr"]["views_share"]
    # The clock of the driver's phases waits once more.
    expected = []
    for kind in ("Bare", "Driver", "Driver", "Plain", "Plain"):
        expected += ["wait", *(["wait"] if kind == "Driver" else []), kind, "wait"]
    assert turns[-len(expected) :] == expected


def test_options_are_timed_beside_the_default(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(model) or model)
    small = ["--model", "resnet10", "--width", "4", "--image-sizes", "8", "--batch-size", "16"]
    place = ["--data-root", str(data_root), "--output-dir", str(tmp_path)]
    assert bench_train.main([*small, "--options", "--steps", "2", "--rounds", "1", *place]) == 0
    with open(tmp_path / "train_options_cpu.csv", newline="") as file:
        rows = {row["loop"]: row for row in csv.DictReader(file)}
    options = [f"driver_{name}" for name in ("crop_flip", "channels_first", "bf16", "compiled")]
    assert list(rows) == ["bare", *options]
    assert len(compiled) == 1
    assert not any(row["over_plain"] for row in rows.values())


def test_ratios_are_of_the_same_rounds() -> None:
    seconds = {"driver_crop_flip": [1.0, 2.0, 4.0], "plain_crop_flip": [2.0, 3.0, 16.0]}
    assert bench_train._ratio(seconds, "driver_crop_flip", "plain_crop_flip") == "2.0000"


def test_goals_are_told_apart() -> None:
    row = {"over_bare": "0.96", "over_plain": "1.2", "loss_share": "0.01", "data_share": "0.03"}
    assert [reached for _, reached in bench_train.goals(row)] == [True, False, True, False]


def test_grad_cache_writes_a_row_for_both_forms(data_root: Path, tmp_path: Path) -> None:
    small = ["--batch-sizes", "32", "--chunk-rows", "16", "--rounds", "1"]
    arguments = ["--data-root", str(data_root), *small, "--output-dir", str(tmp_path)]
    assert bench_grad_cache.main(arguments) == 0
    with open(tmp_path / "grad_cache_cpu.csv", newline="") as file:
        whole, chunks = csv.DictReader(file)
    assert [whole["form"], chunks["form"]] == ["whole", "chunks"]
    assert [whole["chunk_rows"], chunks["chunk_rows"]] == ["64", "16"]
    assert 0 < float(chunks["peak_mib"]) < float(whole["peak_mib"])
    ratio = float(chunks["seconds"]) / float(whole["seconds"])
    assert float(chunks["over_whole"]) == pytest.approx(ratio, rel=1e-4)
