"""The claims of the paper: runs that survive kills, tuned rates, verdicts, and the committed page."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

import train_fixtures  # noqa: F401  puts train/ on the path
from reproduction.claims import METHODS, SCALES, TABLES, Claim
from reproduction.runs import RECORD, Job, Study, jobs_of
from reproduction.verdicts import judge, value
from train_fixtures import TRAIN

paper = import_module("paper")
SHORT = "--table 2 --methods supcon cross_entropy --seeds 1 --trials 1 --epochs 2 --device cpu"


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, str(TRAIN / "paper.py"), *SHORT.split(), "--output_dir", str(folder)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True)


def kill_once(folder: Path, found: str, count: int) -> None:
    """Start the runs, and kill them as soon as so many runs have written a file."""
    process = start(folder)
    while len(list(folder.glob(f"*/{found}"))) < count:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL


def test_killed_twice_gives_the_report_of_one_never_stopped(tmp_path):
    whole = start(tmp_path / "whole")
    killed = tmp_path / "killed"
    kill_once(killed, "last.pt", 1)  # in the middle of the first run
    [checkpoint] = killed.glob("*/last.pt")
    assert not (checkpoint.parent / RECORD).exists()
    kill_once(killed, "last.pt", 2)  # and of the second
    resumed = start(killed)
    assert resumed.wait() == 0 and whole.wait() == 0
    for name in ("digits.md", "paper_digits_runs.csv", "paper_digits_claims.csv"):
        text = (killed / name).read_text()
        assert text == (tmp_path / "whole" / name).read_text()
    assert "2,supcon,cross_entropy,top1,1,450," in text
    assert "6,supcon,cross_entropy,ece,1,450," in text  # of the same runs
    assert (killed / paper.PICTURE).stat().st_size > 0
    output = (checkpoint.parent / "output.txt").read_text()
    assert "resuming after step" in output


def test_the_learning_rate_is_that_of_the_best_trial(tmp_path):
    study = Study(SCALES["digits"], tmp_path, trials=3)
    final = Job("supcon", seed=2)
    for trial, accuracy in enumerate((0.5, 0.9, 0.7)):
        assert study.options(final) is None and study.folder(final) is None
        folder = study.folder(Job("supcon", trial=trial))
        folder.mkdir()
        (folder / RECORD).write_text(json.dumps({"accuracy": accuracy}))
    rates = [
        study.options(Job("supcon", trial=trial)).optimizer.learning_rate for trial in range(3)
    ]
    assert rates == [0.0667, 0.2, 0.6]
    options = study.options(final)
    assert options.optimizer.learning_rate == 0.2 and options.seeds.seed == 2
    assert options.data.validation_fraction is None and options.schedule.epochs == 60
    # Under a condition of ours the rate is that of without.
    assert study.options(Job("supcon_few")).optimizer.learning_rate == 0.2


def test_every_run_of_every_scale_has_options_that_are_accepted(tmp_path):
    for scale in SCALES.values():
        study = Study(scale, tmp_path, trials=1)
        jobs = jobs_of(list(TABLES), seeds=2, trials=1)
        folders = {study.folder(job) for job in jobs}
        # Of the corruptions a job has the folder of its run.
        assert len(folders) == len({(job.method, job.seed) for job in jobs})
        equal = study.options(Job("cross_entropy_2x"))
        assert equal.schedule.epochs == 2 * study.options(Job("supcon")).schedule.epochs
        assert study.cost(Job("cross_entropy_2x")) == study.cost(Job("supcon"))


class Measured(Study):
    """Runs whose scores of images are given: by method and seed the classes that they name."""

    def __init__(self, correct: dict[str, list[float]], images: int = 1000):
        self.correct, self.images = correct, images

    def scores(self, job):
        shares = self.correct[job.method]
        if job.seed >= len(shares):
            return None
        labels = torch.zeros(self.images, dtype=torch.long)
        generator = torch.Generator().manual_seed(
            10 * list(self.correct).index(job.method) + job.seed
        )
        wrong = torch.randperm(self.images, generator=generator) >= shares[job.seed] * self.images
        return torch.nn.functional.one_hot(wrong.long(), 2) * 2.0, labels


@pytest.mark.parametrize(
    ("better", "worse", "verdict"),
    [
        ([0.95, 0.94, 0.95], [0.80, 0.81, 0.79], "shown"),
        ([0.80, 0.81, 0.79], [0.95, 0.94, 0.95], "contradicted"),
        ([0.90, 0.91, 0.90], [0.905, 0.90, 0.90], "not resolved"),
        ([0.95, 0.94], [0.80, 0.81], "not resolved"),  # two seeds
        ([0.95, 0.94, 0.80], [0.80, 0.81, 0.95], "not resolved"),  # the seeds disagree
        ([], [0.9], "not run"),
    ],
)
def test_verdict(better, worse, verdict):
    row = judge(Measured({"a": better, "b": worse}), Claim("a", "b"), "top1", seeds=3)
    assert row["verdict"] == verdict
    assert row["seeds"] == min(len(better), len(worse))
    if verdict == "not resolved":
        assert row["low"] < row["difference"] < row["high"]
        assert row["needed_images"] >= 1000 and row["needed_seeds"] >= 3


def test_calibration_is_better_where_it_is_lower():
    """Every score gives its class a confidence of e² / (e² + 1) = 0.881."""
    study = Measured({"a": [0.88] * 3, "b": [0.5] * 3})
    assert value(study, Job("a"), "ece") == pytest.approx(0.881 - 0.88, abs=1e-3)
    assert value(study, Job("b"), "ece") == pytest.approx(0.881 - 0.5, abs=1e-3)
    assert judge(study, Claim("a", "b"), "ece", seeds=3)["verdict"] == "shown"


def test_claims_name_methods_of_their_table():
    for table in TABLES.values():
        named = {name for claim in table.claims for name in (claim.better, claim.worse)}
        assert named | table.published.keys() <= set(table.methods) <= METHODS.keys()


def test_the_page_is_that_of_the_committed_results():
    page = paper.page(*paper.committed_rows())
    assert paper.PAGE.read_text() == page, "python train/paper.py --update_docs --budget 0min"
    assert (paper.PICTURE in page) == paper.PAGE.with_name(paper.PICTURE).is_file()
