"""A pretraining run as a whole: what it writes, that it repeats, resumes, and refuses."""

import csv
import errno
import fcntl
import json
import multiprocessing
import os
import re
import signal
import time
from functools import partial
from unittest.mock import patch

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import train_fixtures  # noqa: F401  puts train/ on the path
from evaluation.embeddings import pixels
from evaluation.pictures import PICTURES
from run.clock import PHASES
from run.errors import UserError
from run.folder import FolderOptions, RunLock, open_folder
from train_fixtures import metrics, pretrain, weights, write_images
from train_parts import options_of

# Newer Pythons warn of any fork beside threads; these children take no lock of theirs.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

ARTEFACTS = {
    ".lock",
    "config.yaml",
    "metrics.csv",
    "timings.csv",
    "results.json",
    "last.pt",
    "step-10.pt",
    "step-15.pt",
    "encoder.safetensors",
    "export",
    "curves.png",
    "embedding.png",
    "confusion.png",
    "tensorboard",
}
SHORT = ("--batch_size", 256, "--epochs", 3, "--knn_every", 2)


def opened(config):
    """The folder of a run and its checkpoints."""
    with RunLock() as lock:
        return open_folder(config.folder, config.default_name, lock)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three epochs on digits: 5 steps each, evaluated after the second and the last."""
    return pretrain(tmp_path_factory.mktemp("runs"), *SHORT)


def test_writes_every_artefact(run, capsys):
    assert {path.name for path in run.iterdir()} == ARTEFACTS
    # Not at the top: it takes long to import.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == list(range(1, 16))
    assert [event.step for event in board.Scalars("knn_accuracy")] == [0, 10, 15]
    for picture in PICTURES:
        assert (run / picture).read_bytes().startswith(b"\x89PNG")


def test_metrics_hold_every_step_and_evaluation(run):
    rows = metrics(run)
    assert [int(row["step"]) for row in rows if row["loss"]] == list(range(1, 16))
    assert [int(row["epoch"]) for row in rows if row["loss"]] == [1] * 5 + [2] * 5 + [3] * 5
    assert [int(row["step"]) for row in rows if row["knn_accuracy"]] == [0, 10, 15]
    rates = [float(row["learning_rate"]) for row in rows if row["loss"]]
    assert rates[0] == pytest.approx(0.2) and rates == sorted(rates, reverse=True)
    losses = [float(row["loss"]) for row in rows if row["loss"]]
    assert losses[-1] < losses[0]


def test_timings_say_where_each_epoch_went(run):
    with open(run / "timings.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["epoch"]) for row in rows] == [("5", "1"), ("10", "2"), ("15", "3")]
    for row in rows:
        phases = [float(row[f"{phase}_seconds"]) for phase in PHASES]
        assert all(seconds > 0 for seconds in phases)
        # The rest is the last rows, written after the last step.
        assert 0.5 < sum(phases) / float(row["training_seconds"]) <= 1


def test_encoder_is_the_trained_one(run):
    encoder = load_file(run / "encoder.safetensors")
    trained = {
        name.removeprefix("encoder."): value
        for name, value in weights(run).items()
        if name.startswith("encoder.")
    }
    assert encoder.keys() == trained.keys()
    assert all(torch.equal(encoder[name], trained[name]) for name in trained)


def test_encoder_is_rebuilt_from_its_metadata_alone(run):
    from data.views import Views
    from evaluation.embeddings import encode_stored
    from train_parts import build_model, build_views, load_data

    path = run / "encoder.safetensors"
    assert path.stat().st_mode == (run / "last.pt").stat().st_mode
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["encoder"])
    encoder = timm.create_model(about["model"], **about["options"])
    encoder.load_state_dict(load_file(path))
    config = options_of(**yaml.safe_load((run / "config.yaml").read_text()))
    memory_format = config.network.memory_format
    encoder = encoder.to(memory_format=memory_format)
    size, mean, std = (about[key] for key in ("image_size", "mean", "std"))
    same = {"image_size": size, "mean": mean, "std": std, "memory_format": memory_format}
    views = Views(nn.Identity(), **same, seed=0)

    data = load_data(config)
    model = build_model(config, channels=1)
    model.load_state_dict(weights(run))
    images = data.test.images[:8]
    expected = encode_stored(model, build_views(config, data), images)
    assert torch.equal(encoder.eval()(views.plain(images)), expected)


def test_results_repeat_the_last_evaluation(run):
    results = json.loads((run / "results.json").read_text())
    knn = [float(row["knn_accuracy"]) for row in metrics(run) if row["knn_accuracy"]]
    assert results["knn_untrained"] == pytest.approx(knn[0])
    assert results["knn_accuracy"] == pytest.approx(knn[-1])
    assert 0.95 < results["knn_raw_pixels"] < 1
    assert (results["epochs"], results["steps"]) == (3, 15)


def test_same_config_writes_the_same_metrics_with_two_workers(run, tmp_path):
    # From the config that the first run wrote, so that its round trip is tested with it.
    again = pretrain(tmp_path, "--workers", 2, "--name", "again", "--config", run / "config.yaml")
    assert (again / "metrics.csv").read_bytes() == (run / "metrics.csv").read_bytes()
    assert yaml.safe_load((again / "config.yaml").read_text())["workers"] == 2


def test_another_seed_trains_differently(run, tmp_path):
    other = pretrain(tmp_path, *SHORT, "--seed", 1)
    assert metrics(other)[1]["loss"] != metrics(run)[1]["loss"]


def test_resume_auto_without_a_run_starts_one(tmp_path):
    started = pretrain(tmp_path, "--max_steps", 1, "--resume", "auto")
    assert started.name == "digits-supcon-seed0"
    assert json.loads((started / "results.json").read_text())["steps"] == 1


@pytest.mark.parametrize("resume", ["auto", "path"])
def test_run_that_failed_before_its_first_checkpoint_starts_again(tmp_path, monkeypatch, resume):
    def failing(*arguments):
        raise UserError("a failure")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="a failure"):
        patch.setattr("training.trainer.Trainer.step", failing)
        pretrain(tmp_path, "--max_steps", 1, "--name", "a")
    assert (tmp_path / "a/config.yaml").is_file() and not (tmp_path / "a/last.pt").exists()
    monkeypatch.setattr("pretrain.draw", lambda *arguments: None)
    where = "auto" if resume == "auto" else tmp_path / "a"
    pretrain(tmp_path, "--max_steps", 1, "--name", "a", "--resume", where)
    assert [int(row["step"]) for row in metrics(tmp_path / "a") if row["loss"]] == [1]


def test_two_processes_do_not_write_to_one_folder(tmp_path):
    def hold(ready):
        with RunLock() as lock:
            open_folder(named.folder, "", lock)
            # As a worker does, which outlives its process for some seconds.
            worker = context.Process(target=time.sleep, args=(600,))
            worker.start()
            ready.send(worker.pid)
            time.sleep(600)

    context = multiprocessing.get_context("fork")
    named = options_of(output_dir=str(tmp_path), name="a")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(theirs,))
    process.start()
    worker = ours.recv()
    try:
        for resume in ("none", "auto"):
            with pytest.raises(
                UserError, match=f"another process is writing to {tmp_path}/a.*--name"
            ):
                opened(named.changed(resume=resume))
        process.kill()
        process.join()
        assert opened(named) == (tmp_path / "a", [])
    finally:
        process.kill()
        os.kill(worker, signal.SIGKILL)


def test_lock_is_taken_before_the_data_is_loaded(tmp_path, monkeypatch):
    def load(*arguments, **options):
        assert (tmp_path / "a/.lock").is_file()
        raise UserError("no data")

    monkeypatch.setattr("pretrain.load_data", load)
    with pytest.raises(UserError, match="no data"):
        pretrain(tmp_path, "--name", "a")
    assert not (tmp_path / "a").exists()


def test_lock_whose_file_was_removed_is_taken_anew(tmp_path, monkeypatch):
    taken, lockf = [], fcntl.lockf

    def late(file, operation):
        if not taken:
            (tmp_path / "a/.lock").unlink()  # by removed_if_empty of the process before
        taken.append(file)
        lockf(file, operation)

    monkeypatch.setattr("fcntl.lockf", late)
    with RunLock() as lock:
        open_folder(FolderOptions(output_dir=str(tmp_path), name="a"), "", lock)
        assert os.fstat(lock.file.fileno()).st_ino == (tmp_path / "a/.lock").stat().st_ino


def test_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, capsys):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    folder, _ = opened(options_of(output_dir=str(tmp_path)))
    assert f"warning: {folder} cannot be locked (No locks available)" in capsys.readouterr().err


def test_default_names_are_numbered_and_taken_names_refused(tmp_path):

    config = options_of(output_dir=str(tmp_path))
    folders = [opened(config)[0] for _ in range(3)]
    assert [f.name for f in folders] == [f"digits-supcon-seed0{n}" for n in ("", "-2", "-3")]
    (folders[2] / "last.pt").touch()
    assert opened(options_of(output_dir=str(tmp_path), resume="auto")) == (
        folders[2],
        [folders[2] / "last.pt"],
    )
    named = options_of(output_dir=str(tmp_path), name=folders[2].name)
    with pytest.raises(UserError, match=r"already holds a run.*--config .* --resume "):
        opened(named)
    (folders[1] / "notes.txt").touch()
    named = options_of(output_dir=str(tmp_path), name=folders[1].name)
    with pytest.raises(UserError, match=r"seed0-2 is not empty, and holds no run"):
        opened(named)


@pytest.mark.parametrize("kind", ["file", "dangling"])
@pytest.mark.parametrize("options", [{}, {"name": "a"}, {"name": "a", "resume": "auto"}], ids=str)
def test_output_dir_that_cannot_be(tmp_path, kind, options):

    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "file/nowhere")
    config = options_of(output_dir=str(tmp_path / kind), **options)
    with pytest.raises(UserError, match=rf"cannot write a run: .*{kind}.*--output_dir"):
        opened(config)


def test_run_folder_that_cannot_be_written_to(tmp_path, monkeypatch):

    def read_only(**options):
        raise PermissionError(13, "Permission denied", str(options["dir"]))

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(UserError, match=r"Permission denied.*--output_dir"):
        opened(options_of(output_dir=str(tmp_path)))


def test_simclr_ignores_labels(tmp_path, monkeypatch):
    from methods import contrastive as step

    seen = []

    def spy(features, labels, **options):
        seen.append((features.shape, labels, options["temperature"]))
        return original(features, labels, **options)

    original = step.supcon_loss
    monkeypatch.setattr(step, "supcon_loss", spy)
    pretrain(tmp_path, "--method", "simclr", "--max_steps", 1, "--temperature", 0.5)
    pretrain(tmp_path, "--method", "supcon", "--max_steps", 1)
    assert seen[0][0] == (128, 2, 128) and seen[0][2] == 0.5
    assert seen[0][1].tolist() == list(range(128))
    assert seen[1][1].unique().tolist() == list(range(10)) and seen[1][2] == 0.1


def test_clip_grad_bounds_the_gradient_whose_norm_before_is_recorded(tmp_path, monkeypatch):
    original, clipped = torch.optim.Optimizer.zero_grad, []

    def spy(optimizer, *arguments):
        grads = [w.grad for group in optimizer.param_groups for w in group["params"]]
        if grads[0] is not None:
            clipped.append(torch.stack([grad.norm() for grad in grads]).norm().item())
        original(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", spy)
    runs = [
        pretrain(tmp_path, "--max_steps", 2, *options) for options in ((), ("--clip_grad", 0.01))
    ]
    norms = [float(metrics(run)[1]["gradient_norm"]) for run in runs]
    assert norms[0] == pytest.approx(norms[1]) and norms[0] > 0.02
    assert clipped == [pytest.approx(norms[0]), pytest.approx(0.01, rel=1e-3)]


def test_average_of_the_weights_is_evaluated_and_exported(tmp_path):
    from run.saved_run import open_encoder
    from train_parts import build_model, load_checkpoint

    run = pretrain(tmp_path, "--max_steps", 4, "--ema_decay", 0.5, "--save_every", 1, "--keep", 4)
    steps = [load_checkpoint(run / f"step-{step}.pt") for step in (1, 2, 3, 4)]
    average = dict(steps[0]["model"])
    for number, saved in enumerate(steps[1:], 1):
        decay = min(0.5, 1 - (1 + number) ** (-2 / 3))
        for key, value in saved["model"].items():
            average[key] = decay * average[key] + (1 - decay) * value
            if not value.is_floating_point():
                average[key] = value
            torch.testing.assert_close(saved["ema"][key], average[key])

    network = build_model(options_of(model="resnet10", width=4), channels=1)
    network.load_state_dict(steps[-1]["ema"])
    exported = load_file(run / "export/model.safetensors")
    _, kept = open_encoder(run)
    for key, value in network.encoder.state_dict().items():
        assert torch.equal(exported[key], value) and torch.equal(kept[key], value)
    assert not torch.equal(exported["conv1.weight"], steps[-1]["model"]["encoder.conv1.weight"])
    results = json.loads((run / "results.json").read_text())
    accuracies = [knn_of(steps[-1][key]) for key in ("ema", "model")]
    assert results["knn_accuracy"] == accuracies[0] != accuracies[1]


def knn_of(state):
    """The k-NN accuracy on digits of the tiny network with these weights."""
    from evaluation.embeddings import embed, encode_stored
    from evaluation.knn import accuracy, knn_predict
    from train_parts import build_model, build_views, load_data

    config = options_of(model="resnet10", width=4, image_size=8)
    data = load_data(config)
    network = build_model(config, channels=1)
    network.load_state_dict(state)
    network = network.to(memory_format=torch.channels_last)
    encode = partial(encode_stored, network, build_views(config, data))
    cpu = torch.device("cpu")
    test, bank = (embed(encode, split, device=cpu, workers=0) for split in (data.test, data.train))
    predictions = knn_predict(test, bank, data.train.labels, num_classes=10)
    return accuracy(predictions, data.test.labels)


def test_ends_with_the_command_of_the_linear_stage_which_works(run, tmp_path, capsys):
    pretrain(tmp_path, *SHORT, "--resume", run)
    said = capsys.readouterr().out
    (command,) = re.findall(r"python train/linear.py (.*)", said)
    assert command == f"--checkpoint {run}"

    from linear import main

    top1 = main(command.split())
    written = json.loads((run / "linear.json").read_text())
    assert written["top1"] == top1 > 0.3
    assert f"linear top-1 {top1:.2%}" in capsys.readouterr().out
    assert written["top1_train"] >= top1
    (run / "linear.json").unlink()


def test_linear_refuses_a_data_root_that_it_would_not_use(run):
    from linear import main

    with pytest.raises(UserError, match="--data_root contradicts --dataset digits"):
        main(["--checkpoint", str(run), "--data_root", "elsewhere"])


def test_other_images_are_no_images_to_go_on_with(tmp_path):
    images = tmp_path / "images"
    write_images(images, {"cat": 8, "dog": 8})
    options = ("--dataset", f"imagefolder:{images}", "--val_fraction", 0.1, "--batch_size", 4)
    options += ("--max_steps", 2, "--name", "run", "--resume", "auto")
    pretrain(tmp_path, *options)
    write_images(tmp_path / "more", {"owl": 4})
    (tmp_path / "more" / "owl").rename(images / "owl")
    with pytest.raises(UserError, match="another classes, num_images"):
        pretrain(tmp_path, *options)


def test_a_single_test_image_can_be_drawn(tmp_path):
    write_images(tmp_path / "images", {"cat": 5})
    options = ("--dataset", f"imagefolder:{tmp_path / 'images'}", "--val_fraction", 0.1)
    run = pretrain(tmp_path, *options, "--method", "simclr", "--batch_size", 4, "--max_steps", 1)
    assert (run / "embedding.png").is_file()
    assert (run / "results.json").is_file()


def test_raw_pixels_of_large_images_are_a_small_picture():
    for size in (96, 100):  # also where the cells of 32 do not come out even, as MPS needs it
        large = torch.randint(256, (2, 3, size, size), dtype=torch.uint8)
        expected = F.adaptive_avg_pool2d(large.float(), 32).flatten(1)
        with patch("torch.nn.functional.adaptive_avg_pool2d", side_effect=NotImplementedError):
            torch.testing.assert_close(pixels(large), expected)
    small = large[..., :16, :16]
    assert torch.equal(pixels(small), small.flatten(1).float())
