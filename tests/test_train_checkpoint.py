"""Checkpoints by themselves: whole at every moment, verified when read, and only so many of them."""

import io
import multiprocessing
import os
import signal
import zipfile

import pytest
import torch
from torch import nn

import train_fixtures  # noqa: F401  puts train/ on the path
from network.weights import load_weights
from run.atomic_write import explain_full_disk
from run.checkpoint import (
    DamagedCheckpoint,
    RunState,
    checkpoints_in,
    restored_from,
    save_checkpoint,
)
from run.errors import UserError
from run.resume import check_same_run
from run.saved_run import SavedRun, open_newest
from train_parts import load_checkpoint, options_of

# Newer Pythons warn of any fork beside threads; these children take no lock of theirs.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def save(folder, step, *, keep=2, best=False, **changed):
    content = {
        "config": options_of(image_size=16).flat(),
        "model": {"weight": torch.full((1000,), step)},
        "machine": {"world_size": 1, "threads": 1},
        "data": {"classes": ["a", "b"], "channels": 1},
    }
    state = RunState(raw_pixels=0.0, untrained=0.0, accuracy=0.0, step=step)
    save_checkpoint(folder, state, keep=keep, best=best, **(content | changed))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_last_ones_and_the_best_stay(tmp_path):
    for step in (8, 9, 10, 11):
        save(tmp_path, step, best=step == 8)
    assert names(tmp_path) == ["best.pt", "last.pt", "step-10.pt", "step-11.pt"]
    assert load_checkpoint(tmp_path / "best.pt")["state"]["step"] == 8
    assert [path.name for path in checkpoints_in(tmp_path)] == [
        "last.pt",
        "step-11.pt",
        "step-10.pt",
    ]
    # Taken back to step 8, the run has another future.
    save(tmp_path, 9, keep=3)
    assert names(tmp_path) == ["best.pt", "last.pt", "step-9.pt"]


def test_file_system_without_links_gets_copies(tmp_path, monkeypatch):
    def no_links(source, target):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    save(tmp_path, 1, best=True)
    assert names(tmp_path) == ["best.pt", "last.pt", "step-1.pt"]
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_killed_at_any_moment_of_saving_leaves_a_whole_checkpoint(tmp_path):
    def die_at(moment):
        moments = iter(range(1, 1000))

        def dying(call):
            def before(*arguments, **options):
                if next(moments) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **options)

            return before

        for name in ("fsync", "replace", "link", "unlink"):
            setattr(os, name, dying(getattr(os, name)))
        save(tmp_path, 2, best=True, keep=1)

    moment, newest = 0, []
    while not newest or newest[-1][1] != 0:
        moment += 1
        for path in tmp_path.iterdir():
            path.unlink()
        save(tmp_path, 1, best=True)
        child = multiprocessing.get_context("fork").Process(target=die_at, args=(moment,))
        child.start()
        child.join()
        saved = open_newest(checkpoints_in(tmp_path), lambda saved: None)
        step = saved.state.step
        assert torch.equal(saved.content["model"]["weight"], torch.full((1000,), step))
        for name in ("last.pt", "best.pt"):
            load_checkpoint(tmp_path / name)
        newest.append((step, abs(child.exitcode)))
    steps = [step for step, _ in newest]
    assert steps == sorted(steps) and {*steps} == {1, 2}
    assert [code for _, code in newest] == [signal.SIGKILL] * (moment - 1) + [0]
    assert moment > 8


def test_failing_save_leaves_what_was_there(tmp_path, monkeypatch):
    save(tmp_path, 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"No space left.*--resume"):
        patch.setattr(os, "fsync", full_disk)
        with explain_full_disk(tmp_path):
            save(tmp_path, 2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(PermissionError), explain_full_disk(tmp_path):
        raise PermissionError(13, "Permission denied")


def test_no_flipped_bit_is_taken_for_a_weight(tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "last.pt"
    whole, expected = path.read_bytes(), load_checkpoint(path)
    # What torch.load itself makes of it: other weights, without a word.
    weight = expected["model"]["weight"]
    in_weight = whole.index(weight.numpy().tobytes()) + 100
    flipped = bytearray(whole)
    flipped[in_weight] ^= 1
    assert not torch.equal(torch.load(io.BytesIO(flipped))["model"]["weight"], weight)

    found = 0
    for position in (in_weight, *range(0, len(whole), 29)):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        try:
            saved = load_checkpoint(path)
        except DamagedCheckpoint as damage:
            assert str(path) in str(damage)
            found += 1
        else:
            # Of the bytes between the records, and of their dates, nothing is read.
            assert torch.equal(saved["model"]["weight"], weight)
            assert saved["state"] == expected["state"] and saved["config"] == expected["config"]
    assert found > len(whole) / 29 / 2


@pytest.mark.parametrize("size", [0, 1, 0.5, 0.99])
def test_truncated_checkpoint_is_damaged(tmp_path, size):
    save(tmp_path, 1)
    path = tmp_path / "last.pt"
    os.truncate(path, int(size * path.stat().st_size) if size < 1 else size)
    with pytest.raises(DamagedCheckpoint, match=f"{path} is not a readable checkpoint"):
        load_checkpoint(path)


def test_older_format_before_a_zip_file_is_damaged(tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "last.pt"
    saved = torch.load(path, weights_only=True)
    torch.save(saved, path, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(path, "a") as records:
        records.writestr("unrelated", "whole")
    # What torch.load reads is not what has checksums.
    assert torch.load(path, weights_only=True)["state"] == saved["state"]
    with pytest.raises(DamagedCheckpoint, match=f"{path} is not a readable .* begin as a zip"):
        load_checkpoint(path)


def test_foreign_checkpoint_is_an_error_not_a_reason_to_take_an_older_one(tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "last.pt"
    path.unlink()
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=f"{path} was not written by pretrain"):
        open_newest(checkpoints_in(tmp_path), lambda saved: None)


def test_weights_of_another_model_are_refused_in_a_line(tmp_path):
    path = tmp_path / "last.pt"
    load_weights(nn.Linear(3, 2), nn.Linear(3, 2).state_dict(), path)
    for other in (nn.Linear(3, 4), nn.Sequential(*(nn.Linear(3, 2) for _ in range(99)))):
        with pytest.raises(UserError, match=f"{path} holds the weights of another") as raised:
            load_weights(nn.Linear(3, 2), other.state_dict(), path)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


def test_checkpoint_with_unknown_options_is_named_with_them(tmp_path):
    save(tmp_path, 1, config=options_of(image_size=16).flat() | {"momentum": 0.9})
    with pytest.raises(UserError, match=r"another version.*unknown to this one: momentum$"):
        load_checkpoint(tmp_path / "last.pt")


def test_option_that_a_checkpoint_does_not_know_has_its_default(tmp_path):
    expected = options_of(batch_size=32, image_size=16).flat()
    options = dict(expected)
    del options["optimizer"]
    save(tmp_path, 1, config=options)
    assert load_checkpoint(tmp_path / "last.pt")["config"] == expected


CONFIG = options_of(image_size=16).flat()
STATE = {"raw_pixels": 0.0, "untrained": 0.0, "accuracy": 0.0}
DATA = {"classes": ["a", "b"], "channels": 1}
RANDOM = {"cpu": torch.get_rng_state()}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"state": {}}, "its state has no raw_pixels"),
        ({"state": STATE | {"step": -1}}, "its step is -1"),
        ({"state": STATE | {"step": 1.5}}, "its state has float 1.5 for step"),
        ({"state": STATE | {"accuracy": float("nan")}}, "its state has float nan for accuracy"),
        ({"config": [1]}, r"its config is list \[1\]"),
        ({"config": CONFIG | {"width": "wide"}}, "its config has str wide for width"),
        (
            {"config": CONFIG | {"batch_size": 1}},
            "its config says --batch_size 1: must be at least 2",
        ),
        ({"machine": None}, "its machine is NoneType"),
        ({"data": None}, "its data is NoneType"),
        ({"data": DATA | {"channels": 2}}, "its data has int 2 for channels"),
        ({"data": DATA | {"mean": [0.5] * 3}}, "its data has 3 numbers for mean"),
        ({"random_states": [RANDOM] * 2}, "its random_states are 2, not one for each of 1"),
        ({"machine": {"world_size": 2}}, "its random_states are 1, not one for each of 2"),
        ({"random_states": [{"cpu": torch.zeros(3).byte()}]}, "RNG state"),
        ({"model": {}}, "its model holds no weights"),
        ({"model": {"weight": 1.0}}, "its model holds no weights"),
        ({"model": {"weight": torch.tensor([1, float("nan")])}}, "its model.weight is not finite"),
        ({"ema": [1]}, "its ema holds no weights"),
        ({"optimizer": {"state": {0: {"m": torch.tensor(float("inf"))}}}}, "optimizer.state.0.m"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_contents_are_named_and_the_one_before_is_used(tmp_path, capsys, changed, message):
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = tmp_path / "step-2.pt"
    torch.save(torch.load(path, weights_only=True) | changed, path)
    with pytest.raises(DamagedCheckpoint, match=f"^{path} is damaged: .*{message}"):
        load_checkpoint(path)
    (tmp_path / "last.pt").unlink()
    saved = open_newest(checkpoints_in(tmp_path), lambda saved: None)
    assert saved.state.step == 1
    assert f"warning: {path} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (MemoryError(), UserError, r"^out of memory while .*step-2\.pt is loaded"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), UserError, r"^out of memory"),
        (RuntimeError("CUDA error: misaligned address"), RuntimeError, "^CUDA error"),
    ],
    ids=["Python", "CPU", "CUDA"],
)
def test_failure_of_the_machine_is_no_reason_to_take_an_older_one(
    tmp_path, monkeypatch, error, kind, said
):
    def fail(*arguments, **options):
        raise error

    def restore(saved):
        with restored_from(saved.path):
            fail()

    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "last.pt").unlink()
    with pytest.raises(kind, match=said) as raised:
        open_newest(checkpoints_in(tmp_path), restore)
    assert not isinstance(raised.value, DamagedCheckpoint)
    monkeypatch.setattr("torch.load", fail)
    with pytest.raises(kind, match=said) as raised:
        open_newest(checkpoints_in(tmp_path), lambda saved: None)
    assert not isinstance(raised.value, DamagedCheckpoint)


@pytest.mark.parametrize("part", ["state", "machine", "data"])
def test_missing_part_is_named(tmp_path, part):
    save(tmp_path, 1)
    path = tmp_path / "last.pt"
    saved = torch.load(path, weights_only=True)
    del saved[part]
    path.unlink()
    torch.save(saved, path)
    with pytest.raises(DamagedCheckpoint, match=f"{path} is damaged: there is no '{part}'"):
        load_checkpoint(path)


def test_missing_checkpoint_is_named(tmp_path):
    path = tmp_path / "last.pt"
    with pytest.raises(UserError, match=f"there is no checkpoint {path}"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("now", "then", "message"),
    [
        ({"world_size": 1, "threads": 1}, {"world_size": 4, "threads": 1}, "4 processes in all"),
        ({"world_size": 1, "threads": 2}, {"world_size": 1, "threads": 8}, "OMP_NUM_THREADS=8"),
        # The number of threads changes nothing on a GPU.
        ({"world_size": 1, "threads": None}, {"world_size": 1, "threads": 8}, None),
        ({"world_size": 1, "threads": 2}, {"world_size": 1, "threads": None}, None),
    ],
)
def test_another_machine_is_refused_where_its_bits_differ(tmp_path, now, then, message):
    config = options_of()
    saved = SavedRun(tmp_path, {"config": config.flat(), "machine": then})
    if message is None:
        check_same_run(saved, config, now)
        return
    with pytest.raises(UserError, match=message):
        check_same_run(saved, config, now)
