"""Training by two processes: together they do what one does, and they stop and go on together.

Most of it is done by processes that are started once (tests/train_ranks.py); those that are
signalled or killed here are pretrain.py as torchrun starts it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import leaving_ranks
import train_ranks
from data.views import Views
from network.embedder import sync_batch_norms
from network.momentum_encoder import SHUFFLING
from run.errors import UserError
from run.seeds import seed_of
from train_fixtures import TINY, TRAIN, metrics, pretrain
from train_parts import build_model, load_checkpoint, options_of
from train_ranks import CARRYING, OPTIONS, STEPS

SECONDS = 120


def torchrun(
    script: Path, *arguments: object, options: tuple[str, ...] = (), count: int = 2
) -> subprocess.Popen:
    """Start so many processes of a script.

    Without ``--`` torchrun of Python 3.11 takes ``--log`` for the beginning of an option of its own.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command.append(f"--nproc-per-node={count}")
    return subprocess.Popen(
        [*command, *options, "--", str(script), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the processes of train_ranks.py have left."""
    folder = tmp_path_factory.mktemp("ranks")
    started = torchrun(Path(train_ranks.__file__), folder)
    said, _ = started.communicate(timeout=300)
    assert started.returncode == 0, said
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """What each of them has found."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def assert_same(run, whole):
    """The bits of all that a run carries, and of metrics.csv, are the same."""
    assert (run / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    for name in ("last.pt", "best.pt"):
        saved, expected = (load_checkpoint(path / name) for path in (run, whole))
        for part in ("model", "ema", "method", "probe", "optimizer", "random_states", "state"):
            torch.testing.assert_close(saved[part], expected[part], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["plain", "queue", "compiled"])
def test_resumed_run_ends_like_one_never_stopped(found, folder, name):
    assert metrics(folder / name)[-1]["step"] == "30"
    assert_same(folder / f"{name}-resumed", folder / name)


def test_each_process_draws_its_own(found, folder):
    one, other = load_checkpoint(folder / "plain" / "last.pt")["random_states"]
    assert not torch.equal(one["cpu"], other["cpu"])
    assert not torch.equal(found[0]["view"], found[1]["view"])


def test_first_process_alone_speaks(found):
    assert [of_rank["speaks"] for of_rank in found] == [True, False]
    kind, text = found[0]["name taken"]
    assert kind == "UserError" and "already holds a run" in text
    assert found[1]["name taken"] == found[0]["name taken"]


@pytest.mark.parametrize("name", [name for name in STEPS if name != "batch norm"])
def test_trains_as_one_process_does(found, monkeypatch, name):
    monkeypatch.setattr(Views, "random", train_ranks.plain_view)
    alone = train_ranks.train(STEPS[name])
    begun = build_model(options_of(**STEPS[name]), channels=1).state_dict()
    for losses, state in (of_rank[name] for of_rank in found):
        assert losses == found[0][name][0]
        assert losses == pytest.approx(alone.losses, rel=1e-5)
        for key, value in state["model"].items():
            torch.testing.assert_close(value, alone.model.state_dict()[key], rtol=1e-4, atol=1e-5)
        moved = state["model"]["encoder.stem.0.weight"] - begun["encoder.stem.0.weight"]
        assert moved.abs().max() > 1e-3
        weights = dict(alone.method.named_parameters())
        for key, value in state["method"].items():
            assert torch.equal(value, found[0][name][1]["method"][key])
            if key in weights:
                torch.testing.assert_close(value, weights[key].detach(), rtol=1e-4, atol=1e-5)
        if "queue_size" in STEPS[name]:
            labels = state["method"]["queue.labels"], alone.method.queue.labels
            ours, theirs = (part.sort().values for part in labels)
            assert torch.equal(ours, theirs)


def test_all_have_the_same_weights(found):
    one, other = (of_rank["batch norm"][1] for of_rank in found)
    for part in ("model", "ema"):
        for key, value in one[part].items():
            assert torch.equal(value, other[part][key]) or "running" in key, key
    probes = [state["probe"]["classifier"]["1.weight"] for state in (one, other)]
    assert torch.equal(*probes) and probes[0].any()


def test_evaluates_as_one_process_does(found, folder):
    trainer = train_ranks.train(STEPS["batch norm"])
    state = found[0]["batch norm"][1]
    trainer.load_state_dict(state)
    expected = train_ranks.predictions(trainer, STEPS["batch norm"])
    assert torch.equal(found[0]["predictions"], expected)
    assert torch.equal(found[1]["predictions"], expected)


def test_each_keeps_its_share_of_the_neighbours_and_votes_as_one_process_does(found):
    alone = train_ranks.nearest()
    shares = [of_rank["nearest"] for of_rank in found]
    for size, counts in ((1100, [1024, 76]), (500, [500, 0])):
        assert alone[f"{size} rows here"] == size
        assert [share[f"{size} rows here"] for share in shares] == counts
        for share in shares:
            for what in (f"nearest of {size}", f"classes of {size}"):
                assert torch.equal(share[what], alone[what]), what


def test_gradient_by_chunks_is_that_of_one_process(found):
    loss, expected = train_ranks.gradient_by_chunks()
    for of_rank in found:
        torch.testing.assert_close(of_rank["gradient"], (loss, expected), rtol=0, atol=1e-10)


def test_keys_do_not_know_the_batch_of_their_queries(found):
    shuffled, left = (torch.cat(parts) for parts in zip(*(of_rank["keys"] for of_rank in found)))
    for own in (slice(16), slice(16, 32)):
        # Left where their queries are, the keys of a process have the mean of its batch.
        torch.testing.assert_close(left[own].mean(0), torch.zeros(3), rtol=0, atol=1e-6)
        assert shuffled[own].mean(0).abs().min() > 0.1
    # Each is that of its own row, normalised among those that a pure function of seed and step draws.
    rows = torch.cat([train_ranks.rows_of(rank) for rank in (0, 1)])
    generator = torch.Generator().manual_seed(seed_of(0, SHUFFLING, 5))
    for batch in torch.randperm(32, generator=generator).split(16):
        expected = train_ranks.BatchNorm()(rows[batch])[1]
        torch.testing.assert_close(shuffled[batch], expected)


def test_one_that_vanishes_ends_the_other_with_the_reason(found, folder):
    text = (folder / "lost.txt").read_text()
    assert text.startswith("process 0 of 2 lost the others: one has ended, cannot be reached")


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """The folder of three processes, what each has found, and what all have said."""
    folder = tmp_path_factory.mktemp("three")
    started = torchrun(Path(train_ranks.__file__), folder, count=3)
    said, _ = started.communicate(timeout=300)
    assert started.returncode == 0, said
    found = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(3)]
    return folder, found, said


def test_three_resumed_end_like_three_never_stopped(three):
    # From three on it matters in which order gradients are added up.
    assert_same(three[0] / "resumed", three[0] / "whole")


def test_warnings_and_mistakes_of_all_are_said_by_the_first(three):
    _, found, said = three
    assert said.count("UserWarning: warned by all") == 1
    assert "find_unused_parameters" not in said
    kind, text = found[0]["refused"]
    assert kind == "UserError" and text.startswith("--batch_size 128 is no multiple of the 3")
    assert [of_rank["refused"] for of_rank in found[1:]] == [("SystemExit", "1")] * 2


def test_mistake_of_one_ends_all_and_is_said_by_the_first(three):
    ends = [of_rank["alone"] for of_rank in three[1]]
    assert ends[0] == ("UserError", "process 1 of 3: no such image")
    assert ends[1:] == [("SystemExit", "1")] * 2


def test_no_connection_is_left_when_a_process_ends(three):
    assert [of_rank["threads"] for of_rank in three[1]] == [[]] * 3


def test_no_connection_is_left_however_a_process_leaves(tmp_path):
    started = torchrun(Path(leaving_ranks.__file__), tmp_path)
    said, _ = started.communicate(timeout=SECONDS)
    assert started.returncode == 0, said
    for rank in range(2):
        found = json.loads((tmp_path / f"left{rank}.json").read_text())
        assert found == {"end": [], "fail": [], "fail_from_another": []}


def test_another_number_of_processes_is_refused(found, folder):
    options = (*OPTIONS, *CARRYING, "--resume", folder / "plain")
    with pytest.raises(UserError, match=r"1 processes, .* with 2: sums.*torchrun, 2 processes in"):
        pretrain(folder, *options)


def test_batch_norms_become_those_of_all_processes():
    config = options_of(model="resnet10", width=4)
    plain = build_model(config, channels=1)
    names = {name for name, part in plain.named_modules() if isinstance(part, torch.nn.BatchNorm2d)}
    state = {key: value.clone() for key, value in plain.state_dict().items()}
    synced = sync_batch_norms(plain)
    parts = dict(synced.named_modules())
    assert names and all(isinstance(parts[name], torch.nn.SyncBatchNorm) for name in names)
    torch.testing.assert_close(dict(synced.state_dict()), state, rtol=0, atol=0)


def test_batch_norms_of_all_processes_need_a_gpu(tmp_path):
    with pytest.raises(UserError, match="--sync_batchnorm needs --device cuda, and this is cpu"):
        pretrain(tmp_path, "--sync_batchnorm", "true")


def wait_for(path: Path, started: subprocess.Popen) -> None:
    """Until a file is there."""
    for _ in range(100 * SECONDS):
        if path.exists():
            return
        assert started.poll() is None, started.stdout.read()
        time.sleep(0.01)
    raise AssertionError(f"{path} did not come")


def process_of(started: subprocess.Popen, rank: int) -> int:
    """The process of that rank that torchrun has started."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        parent = int(status.read_text().rpartition(")")[2].split()[1])
        variables = status.with_name("environ")
        if parent == started.pid and f"\0RANK={rank}\0" in variables.read_text():
            return int(status.parent.name)
    raise AssertionError(f"there is no process of rank {rank}")


def test_signalled_then_killed_and_restarted_ends_like_one_never_stopped(found, folder, tmp_path):
    arguments = [*TINY, *OPTIONS, *CARRYING, f"--output_dir={tmp_path}", "--name=plain"]
    arguments += ["--resume=auto", "--timeout_minutes=1", "--log=csv"]
    run = tmp_path / "plain"

    # A signal to one stops both after the same step.
    started = torchrun(TRAIN / "pretrain.py", *arguments)
    wait_for(run / "step-3.pt", started)
    os.kill(process_of(started, 1), signal.SIGTERM)
    said, _ = started.communicate(timeout=SECONDS)
    assert started.returncode == 1
    # The first that ended; torchrun ends the other.
    assert "SIGTERM: stopped after saving" in said and "exitcode  : 75" in said, said
    assert (run / "REQUEUE").exists()
    step = load_checkpoint(run / "last.pt")["state"]["step"]
    assert 3 <= step < 30

    # One killed ends both, and torchrun starts them again.
    started = torchrun(TRAIN / "pretrain.py", *arguments, options=("--max-restarts=1",))
    wait_for(run / f"step-{3 * (step // 3 + 1)}.pt", started)
    os.kill(process_of(started, 1), signal.SIGKILL)
    said, _ = started.communicate(timeout=SECONDS)
    assert started.returncode == 0, said
    assert said.count("resuming after step") == 2, said
    assert not (run / "REQUEUE").exists()
    assert_same(run, folder / "plain")
