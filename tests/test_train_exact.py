"""A run that is killed, asked to leave or short of disk, and goes on, ends like one left alone.

The runs that die are forks of this process: real processes and real signals without 7 s of imports.
"""

import math
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_fixtures  # noqa: F401  puts train/ on the path
from evaluation.embeddings import embed, encode_stored
from run.checkpoint import checkpoints_in
from run.command_line import run_script
from run.errors import UserError
from train_fixtures import metrics, pretrain, weights, write_images, write_shards
from train_parts import build_model, build_views, load_checkpoint, load_data, options_of
from training.trainer import Trainer

# Newer Pythons warn of any fork beside threads; these children take no lock of theirs.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

# Three epochs of five steps on digits, evaluated after the second and the last.
STEPS_PER_EPOCH, NUM_STEPS = 5, 15
OPTIONS = ("--batch_size", 256, "--epochs", 3, "--knn_every", 2, "--save_every", 3)
# It costs no step, and chooses best.pt.
OPTIONS += ("--validation_fraction", 0.04)
NAME = "digits-supcon-seed0"


@pytest.fixture(scope="module", autouse=True)
def drawing_network():
    """Have every step draw a random number, as dropout would.

    The pictures, the slowest part of so short a run, are left out.
    """
    import pretrain as script

    original = Trainer.loss

    def loss(*arguments):
        return original(*arguments) + 0.01 * torch.rand(())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "loss", loss)
        patch.setattr(script, "draw", lambda *arguments: None)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing happens to."""
    return pretrain(tmp_path_factory.mktemp("whole"), *OPTIONS)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run killed in its twelfth step, with checkpoints of steps 9 and 10."""
    folder = tmp_path_factory.mktemp("killed")
    assert run_in_fork(folder, at_step(11, kill), write_rows_at_once) == -signal.SIGKILL
    assert metrics(folder / NAME)[-1]["step"] == "11"
    return folder


def run_in_fork(output_dir, *changes, options=()):
    """Run pretrain.py in a child process after some changes to it; returns its exit code.

    Its errors are written to output_dir/stderr.
    """

    def child():
        os.setpgrp()  # so that it can signal its whole group
        sys.stderr = open(output_dir / "stderr", "w", buffering=1)  # noqa: SIM115
        for change in changes:
            change()
        run_script(lambda: pretrain(output_dir, *OPTIONS, *options))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    # Not with a timeout: that would wait for the workers of a killed process to notice, too.
    process.join()
    return process.exitcode


def at_step(number, act):
    """The change that calls `act` in the middle of the step after `number` finished ones."""

    def change():
        original = Trainer.step

        def step(trainer, images, labels, step):
            def act_in_it(*arguments):
                value = loss(*arguments)
                if step == number:
                    act()
                return value

            loss, trainer.loss = trainer.loss, act_in_it
            value = original(trainer, images, labels, step)
            del trainer.loss
            return value

        Trainer.step = step

    return change


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def write_rows_at_once():
    """Have rows on the disk that no checkpoint covers yet."""
    from run import records as report

    add = report.Table.add

    def add_and_flush(table, **values):
        add(table, **values)
        table.file.flush()

    report.STEPS_PER_FLUSH = 1
    report.Table.add = add_and_flush


def assert_same(run, whole):
    """The bits of the weights and of metrics.csv are the same."""
    assert (run / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(run).items())
    best, expected = (load_checkpoint(folder / "best.pt")["state"] for folder in (run, whole))
    assert best == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_random_steps_ends_like_one_never_killed(whole, tmp_path, workers):
    steps = sorted(random.SystemRandom().sample(range(NUM_STEPS), 3))
    print("killed in the steps after", steps)
    resume = ("--workers", workers, "--resume", "auto")
    # One of the two loses the rows since its checkpoint, the other has too many.
    changes = [write_rows_at_once] if workers == 0 else []
    for step in steps:
        killed = run_in_fork(tmp_path, at_step(step, kill), *changes, options=resume)
        assert killed == -signal.SIGKILL
    run = pretrain(tmp_path, *OPTIONS, *resume)
    assert run == tmp_path / NAME
    assert_same(run, whole)


@pytest.mark.parametrize(
    ("name", "workers", "step"),
    # In the middle of an epoch; in the last step of one, whose evaluation is then left to do.
    [("SIGTERM", 2, 6), ("SIGUSR1", 0, 9)],
)
def test_signal_finishes_the_step_and_saves(whole, tmp_path, name, workers, step):
    # By another process to the whole group, as torchrun and timeout do: the workers, which would
    # take it from nobody but their parent, must not die of it.
    def signal_group():
        subprocess.run(["sh", "-c", f"kill -s {name.removeprefix('SIG')} 0"])

    options = ("--workers", workers)
    assert run_in_fork(tmp_path, at_step(step, signal_group), options=options) == 75
    run = tmp_path / NAME
    assert (run / "REQUEUE").exists()
    said = (tmp_path / "stderr").read_text()
    assert f"{name}: stopped" in said
    assert load_checkpoint(run / "last.pt")["state"]["step"] == step + 1
    # As it was told, and nothing else.
    pretrain(tmp_path, *shlex.split(said.split("continue by ")[1].splitlines()[0]))
    assert not (run / "REQUEUE").exists()
    assert_same(run, whole)


# All that a run can carry from step to step; the queue is full after three, and turns over.
CARRYING = ("--ema_decay", 0.9, "--queue_size", 640, "--queue_momentum", 0.9, "--probe", "true")


@pytest.fixture(scope="module")
def carrying(tmp_path_factory):
    """The run with averages, a queue and a probe that nothing happens to."""
    return pretrain(tmp_path_factory.mktemp("carrying"), *OPTIONS, *CARRYING)


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_with_averages_queue_and_probe_ends_like_one_never_killed(
    carrying, tmp_path, workers
):
    step = random.SystemRandom().randrange(3, NUM_STEPS)
    print("killed in the step after", step)
    resume = ("--workers", workers, "--resume", "auto")
    killed = run_in_fork(tmp_path, at_step(step, kill), options=(*CARRYING, *resume))
    assert killed == -signal.SIGKILL
    run = pretrain(tmp_path, *OPTIONS, *CARRYING, *resume)
    assert_same(run, carrying)
    for name in ("last.pt", "best.pt"):
        saved, expected = (load_checkpoint(folder / name) for folder in (run, carrying))
        for part in ("ema", "method", "probe", "optimizer"):
            torch.testing.assert_close(saved[part], expected[part], rtol=0, atol=0)
    exported, expected = (load_file(path / "export/model.safetensors") for path in (run, carrying))
    assert all(torch.equal(exported[key], expected[key]) for key in expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_on_shards_ends_like_one_never_killed(tmp_path, workers):
    # Two epochs of five steps; killed in the second epoch, two steps after a checkpoint.
    urls = write_shards(tmp_path / "shards", [17, 7, 12])
    options = ("--dataset", f"webdataset:{urls}", "--val_fraction", 0.1, "--batch_size", 6)
    options += ("--epochs", 2, "--name", NAME)
    whole = pretrain(tmp_path / "whole", *OPTIONS, *options)
    assert metrics(whole)[-1]["step"] == "10"
    (folder := tmp_path / "killed").mkdir()
    options += ("--workers", workers, "--resume", "auto")
    assert run_in_fork(folder, at_step(8, kill), options=options) == -signal.SIGKILL
    assert load_checkpoint(folder / NAME / "last.pt")["state"]["step"] == 6
    assert_same(pretrain(folder, *OPTIONS, *options), whole)


def test_probe_leaves_the_training_alone(whole, tmp_path):
    probed = pretrain(tmp_path, *OPTIONS, "--probe", "true")
    trained = weights(whole)
    assert all(torch.equal(value, trained[name]) for name, value in weights(probed).items())
    rows = [[dict(row, probe_accuracy="") for row in metrics(run)] for run in (probed, whole)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("evaluation", [1, 2])
def test_signal_in_an_evaluation_does_not_wait_for_its_end(whole, tmp_path, evaluation):
    def stop_in_evaluation():
        from evaluation import evaluator as script

        calls = []
        original = script.encode_stored

        def encode(*arguments):
            # Each evaluation encodes 50 validation and 1297 training images, 512 at a time.
            calls.append(arguments)
            if len(calls) == 4 * evaluation - 3:
                os.kill(os.getpid(), signal.SIGTERM)
            assert len(calls) <= 4 * evaluation - 3
            return original(*arguments)

        script.encode_stored = encode

    assert run_in_fork(tmp_path, stop_in_evaluation) == 75
    run = tmp_path / NAME
    assert (run / "REQUEUE").exists()
    saved = [load_checkpoint(path)["state"] for path in checkpoints_in(run)[:1]]
    assert [(state["step"], state["epoch"]) for state in saved] == [[], [(10, 1)]][evaluation - 1]
    assert_same(pretrain(tmp_path, *OPTIONS, "--resume", "auto"), whole)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def change_contents(path, **changed):
    content = torch.load(path, weights_only=True) | changed
    path.unlink()  # of which last.pt is another name
    torch.save(content, path)


def other_shapes(path):
    state = torch.load(path, weights_only=True)["optimizer"]
    for of_weight in state["state"].values():
        of_weight["momentum_buffer"] = torch.zeros(3, 3)
    change_contents(path, optimizer=state)


def step_of_another_epoch(path):
    state = torch.load(path, weights_only=True)["state"]
    change_contents(path, state=state | {"step": 4})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "is not a readable checkpoint"),
        (flip_a_bit, "is not a readable checkpoint"),
        (other_shapes, r"is damaged: the optimizer's momentum_buffer is (3, 3) for a weight of"),
        (step_of_another_epoch, "is damaged: its step 4 is not in its epoch 2"),
        (partial(change_contents, model={"x": torch.zeros(1)}), "is damaged: Error(s) in loading"),
        (partial(change_contents, random_states=[{}]), "is damaged: there is no 'cpu'"),
    ],
    ids=["truncated", "flipped", "shapes", "step", "model", "random"],
)
def test_damaged_checkpoint_is_named_and_the_one_before_it_used(
    killed, whole, tmp_path, capsys, damage, said
):
    run = shutil.copytree(killed / NAME, tmp_path / NAME)
    assert {path.name for path in checkpoints_in(run)} == {"last.pt", "step-10.pt", "step-9.pt"}
    damage(run / "last.pt")
    damage(run / "step-10.pt")
    pretrain(tmp_path, *OPTIONS, "--resume", "auto")
    output = capsys.readouterr()
    for name in ("last.pt", "step-10.pt"):
        assert f"warning: {run / name} {said}" in output.err
    assert "resuming after step 9" in output.out
    assert_same(run, whole)


def test_no_whole_checkpoint_is_an_error_and_starts_nothing_anew(killed, tmp_path):
    run = shutil.copytree(killed / NAME, tmp_path / NAME)
    for path in checkpoints_in(run):
        truncate(path)
    with pytest.raises(UserError, match=r"step-9\.pt is not a readable checkpoint"):
        pretrain(tmp_path, *OPTIONS, "--resume", "auto")
    assert metrics(run) == metrics(killed / NAME)


@pytest.mark.parametrize(
    "option", [("--width", 100_000), ("--queue_size", 1_000_000_000), ("--image_size", 100_000)]
)
def test_size_that_does_not_fit_is_named_in_one_line(tmp_path, option):
    def little_memory():
        resource.setrlimit(resource.RLIMIT_AS, (2**37, 2**37))

    assert run_in_fork(tmp_path, little_memory, options=option) == 1
    error = (tmp_path / "stderr").read_text()
    assert error.startswith("error: out of memory: lower one of ") and error.count("\n") == 1
    assert f"{option[0]} {option[1]}" in error
    assert not (tmp_path / NAME).exists()


def test_full_disk_ends_with_a_clear_error_and_loses_nothing(whole, tmp_path):
    def no_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    # The next checkpoint would be of step 12; a checkpoint is larger than the limit.
    assert run_in_fork(tmp_path, at_step(10, no_room)) == 1
    run = tmp_path / NAME
    error = (tmp_path / "stderr").read_text()
    assert error.startswith(f"error: cannot write to {run}: File too large.") and str(run) in error
    assert error.count("\n") == 1
    assert not list(run.glob("*.tmp"))
    assert [load_checkpoint(path)["state"]["step"] for path in checkpoints_in(run)] == [10, 10, 9]
    assert_same(pretrain(tmp_path, *OPTIONS, "--resume", run), whole)


def test_resuming_on_a_full_disk_loses_nothing(killed, tmp_path):
    run = shutil.copytree(killed / NAME, tmp_path / NAME)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}

    def no_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    assert run_in_fork(tmp_path, no_room, options=("--resume", "auto")) != 0
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_resuming_a_finished_run_changes_nothing(whole):
    before = (whole / "metrics.csv").read_bytes(), (whole / "last.pt").read_bytes()
    assert pretrain(whole.parent, *OPTIONS, "--resume", whole) == whole
    assert ((whole / "metrics.csv").read_bytes(), (whole / "last.pt").read_bytes()) == before


def test_resume_from_an_older_checkpoint_drops_what_followed(killed, whole, tmp_path):
    run = shutil.copytree(killed / NAME, tmp_path / NAME)
    pretrain(tmp_path, *OPTIONS, "--resume", run / "step-9.pt")
    assert {path.name for path in run.glob("step-*")} == {"step-12.pt", "step-15.pt"}
    assert_same(run, whole)


def test_resume_with_other_options_names_them(whole):
    with pytest.raises(UserError, match=r"--temperature is 0\.5, was 0\.1.*config\.yaml"):
        pretrain(whole.parent, *OPTIONS, "--resume", whole / "last.pt", "--temperature", 0.5)


def test_resume_with_another_model_names_it(whole, capsys):
    options = ("--resume", whole, "--model", "resnet18")
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: pretrain(whole.parent, *OPTIONS, *options))
    error = capsys.readouterr().err
    assert ended.value.code == 1 and error.count("\n") == 1
    assert f"error: cannot resume {whole / 'last.pt'} with other options: " in error
    assert "--model is resnet18, was resnet10" in error


def test_resume_with_other_threads_is_refused_with_the_reason(whole):
    torch.set_num_threads(2)
    try:
        with pytest.raises(UserError, match=r"2 CPU threads.*with 1: sums.*OMP_NUM_THREADS=1"):
            pretrain(whole.parent, *OPTIONS, "--resume", whole)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_draws_no_random_number(tmp_path, workers):
    write_images(tmp_path, {"cat": 6, "dog": 6})
    config = options_of(
        dataset=f"imagefolder:{tmp_path}", val_fraction=0.5, model="resnet10", width=4
    )
    data = load_data(config)
    encode = partial(encode_stored, build_model(config, channels=3), build_views(config, data))

    def states():
        return [
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),
        ]

    before = states()
    cpu = torch.device("cpu")
    embed(encode, data.test, device=cpu, workers=workers)
    assert states() == before


def test_evaluating_less_often_trains_the_same(whole, tmp_path):
    other = pretrain(tmp_path, *OPTIONS, "--knn_every", 0, "--save_every", 0, "--keep", 1)
    losses = [[row["loss"] for row in metrics(run) if row["loss"]] for run in (other, whole)]
    assert losses[0] == losses[1]
    assert [path.name for path in other.glob("step-*")] == [f"step-{NUM_STEPS}.pt"]


def test_gradient_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    original = Trainer.loss

    calls = []

    def loss(*arguments):
        calls.append(arguments)
        value = original(*arguments)
        # Adds nothing, with a gradient of 0 / 0.
        return value + (0 * value).sqrt() if len(calls) == 3 else value

    monkeypatch.setattr(Trainer, "loss", loss)
    with pytest.raises(UserError, match=r"gradient is nan at step 3, learning rate 0\.191: try"):
        pretrain(tmp_path, *OPTIONS)
    run = tmp_path / NAME
    assert not checkpoints_in(run)
    assert len([row for row in metrics(run) if row["loss"]]) == 2


def test_collapse_is_named_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    original = Trainer.loss

    def loss(*arguments):
        # Two views of 256 images, all embedded alike: without a slope that leads out.
        return 0 * original(*arguments) + math.log(2 * 256 - 1)

    monkeypatch.setattr(Trainer, "loss", loss)
    run = pretrain(tmp_path, *OPTIONS, "--epochs", 5)
    assert capsys.readouterr().out.count("warning: the loss has stayed at 6.2364 for 20 steps") == 1
    assert metrics(run)[-1]["step"] == "25"
