"""The claims of the paper: runs that survive kills, tuned rates, verdicts, and the committed page."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

import train_fixtures  # noqa: F401  puts train/ on the path
from reproduction import processes
from reproduction.claims import METRICS, SEVERITIES, TABLES, Claim
from reproduction.methods import BASELINES, METHODS, SETTINGS
from reproduction.pictures import FIGURES, OVERVIEW, pictures
from reproduction.report import CLAIM_COLUMNS, RUN_COLUMNS, read_rows, summary
from reproduction.runs import EVALUATION, RECORD, Job, Study, jobs_of
from reproduction.scales import SCALES
from reproduction.schedule import make
from reproduction.verdicts import judge, value
from run.atomic_write import replace_text
from run.errors import UserError
from run.saved_run import open_run
from train_fixtures import TRAIN
from training.divergence import REMEDY

paper = import_module("paper")
SHORT = "--table 2 --methods supcon cross_entropy --seeds 1 --trials 1 --epochs 2 --device cpu"


def start(folder: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, str(TRAIN / "paper.py"), *SHORT.split(), "--output_dir", str(folder)]
    command += options
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True)


def kill_once(folder: Path, found: str, count: int) -> None:
    """Start the runs, and kill them as soon as so many runs have written a file."""
    process = start(folder)
    while len(list(folder.glob(f"*/{found}"))) < count:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL


def test_killed_twice_gives_the_report_of_two_jobs_never_stopped(tmp_path):
    whole = start(tmp_path / "whole", "--jobs", "2")
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
    assert (killed / OVERVIEW).stat().st_size > 0
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
    # Its baselines see the same images.
    for name in ("supcon_few", "raw_pixels_few", "untrained_few"):
        assert study.options(Job(name)).data.train_images == 500
    assert len({study.folder(Job(name)) for name in BASELINES}) == len(BASELINES)


def test_every_run_of_every_scale_has_options_that_are_accepted(tmp_path):
    for scale in SCALES.values():
        study = Study(scale, tmp_path, trials=1)
        for job in jobs_of(list(TABLES), METHODS, scale, seeds=1, trials=1):
            assert study.folder(job) is not None
        equal = study.options(Job("cross_entropy_2x"))
        assert equal.schedule.epochs == 2 * study.options(Job("supcon")).schedule.epochs
        assert study.cost(Job("cross_entropy_2x")) == study.cost(Job("supcon"))


def test_runs_that_were_made_stay_valid(tmp_path):
    """A folder is named by the hash of the options: results are kept for as long as the names are."""
    study = Study(SCALES["fmnist10k"], tmp_path, trials=1)
    assert study.folder(Job("supcon")).name == "cfd9e98ea135"
    assert study.folder(Job("cross_entropy", seed=1)).name == "95660e81925e"
    # What has the same options is the same run.
    for name in ("supcon_momentum", "supcon_simclr"):
        assert study.folder(Job(name)) == study.folder(Job("supcon"))
    # Two stages have the encoder of another run, and a folder of their own.
    jobs = [Job("cross_entropy"), Job("cross_entropy_two_stages"), Job("momentum_momentum")]
    assert len(set(map(study.folder, [*jobs, Job("supcon")]))) == 4


def test_methods_that_are_asked_for_bring_what_they_need():
    jobs = jobs_of(
        ["8", "tail"], ["lars_rmsprop", "supcon_tail"], SCALES["digits"], seeds=1, trials=3
    )
    named = list(dict.fromkeys((job.method, job.trial is None) for job in jobs))
    assert named == [
        ("raw_pixels_tail", True), ("untrained_tail", True), ("raw_pixels", True),
        ("untrained", True), ("supcon", False), ("supcon_tail", True), ("supcon_lars", False),
        ("lars_rmsprop", False), ("supcon_lars", True), ("lars_rmsprop", True),
    ]  # fmt: skip
    # Grey images have no policies.
    grey, coloured = (
        {job.method for job in jobs_of(["9"], METHODS, SCALES[name], seeds=1, trials=1)}
        for name in ("fmnist10k", "cifar10")
    )
    assert "crop_flip_simclr" in grey and "randaugment_simclr_blur" not in grey
    assert "randaugment_simclr_blur" in coloured and "crop_flip_simclr" not in coloured


def record(study: Study, job: Job, accuracy: float) -> None:
    folder = study.folder(job)
    folder.mkdir(exist_ok=True)
    (folder / RECORD).write_text(json.dumps({"accuracy": accuracy}))


def test_a_linear_stage_is_tuned_on_the_encoder_of_the_best_trial(tmp_path):
    study = Study(SCALES["digits"], tmp_path, trials=3)
    final = Job("lars_rmsprop", seed=1)
    for trial, accuracy in enumerate((0.5, 0.7, 0.9)):
        assert study.folder(Job("lars_rmsprop", trial=0)) is None
        record(study, Job("supcon_lars", trial=trial), accuracy)
    best = study.options(Job("supcon_lars", trial=2))
    for trial, accuracy in enumerate((0.6, 0.9, 0.6)):
        assert study.folder(final) is None
        assert study.options(Job("lars_rmsprop", trial=trial)) == best
        record(study, Job("lars_rmsprop", trial=trial), accuracy)
    resolved = study.resolved(final)
    assert resolved["learning_rate"] == best.optimizer.learning_rate and resolved["seed"] == 1
    assert (
        resolved["linear"] | {"optimizer": "rmsprop", "learning_rate": 0.15} == resolved["linear"]
    )


class Pretended(Study):
    """Runs that a function stands for; each is noted when it starts, and needs a record to be done."""

    def __init__(self, root: Path, trials: int, run: Callable[[Job], object] = lambda job: None):
        super().__init__(SCALES["digits"], root, trials)
        self.run, self.started = run, []

    def do(self, job: Job) -> None:
        self.started.append(job)
        self.run(job)
        folder = self.folder(job)
        if folder is None:
            super().do(job)
        folder.mkdir(exist_ok=True)
        done = {"accuracy": 0.5, "cost": self.cost(job), "seconds": 60 * self.cost(job)}
        replace_text(folder / RECORD, json.dumps(done))


def test_a_job_that_waits_for_another_blocks_none_behind_it(tmp_path):
    behind, waiting = Job("cross_entropy", trial=1), Job("supcon")
    others_run = threading.Event()

    def run(job: Job) -> None:
        if job == Job("supcon", trial=1):
            assert others_run.wait(60)  # all others that can be made are made beside it
        if job == behind:
            assert waiting not in study.started
            others_run.set()

    trials = [Job(name, trial=k) for name in ("supcon", "cross_entropy") for k in (0, 1)]
    two_stages, first_stage = Job("cross_entropy_two_stages"), Job("cross_entropy")
    jobs = [trials[0], trials[1], waiting, trials[2], trials[3], two_stages, first_stage]
    study = Pretended(tmp_path, 2, run)
    make(study, jobs, float("inf"), at_once=2)
    assert study.started[:2] == trials[:2] and set(study.started) == set(jobs)
    assert study.started.index(two_stages) > study.started.index(first_stage)
    make(study, jobs, float("inf"), at_once=2)
    assert len(study.started) == len(jobs)  # nothing is left


def test_runs_of_the_same_options_are_one(tmp_path):
    """At once they would write to the same folder."""
    study = Pretended(tmp_path, 1)
    make(study, [Job("supcon"), Job("supcon_momentum"), Job("simclr")], float("inf"), at_once=3)
    assert sorted(map(str, study.started)) == ["simclr seed 0", "supcon seed 0"]


def test_who_writes_to_the_same_folder_takes_turns(tmp_path):
    """Corruptions are measured of the reference, too; and the first run of a study gets the data."""
    running, most = [], []

    def run(job: Job) -> None:
        running.append(job)
        time.sleep(0.05)
        most.append([*running])
        running.remove(job)

    class Corrupted(Pretended):
        def record(self, job: Job) -> dict | None:
            done = super().record(replace(job, corrupted=False))
            return done if not job.corrupted or job in self.started else None

    study = Corrupted(tmp_path, 1, run)
    names = ("cross_entropy", "supcon", "simclr", "max_margin")
    jobs = [Job(name) for name in names] + [Job(name, corrupted=True) for name in names[1:]]
    make(study, jobs, float("inf"), at_once=3)
    assert most[0] == jobs[:1] and max(map(len, most)) > 1
    assert all(sum(job.corrupted for job in at_once) <= 1 for at_once in most)


def test_a_run_that_fails_ends_no_other(tmp_path, capsys):
    def run(job: Job) -> None:
        if job == Job("supcon", trial=0):
            raise UserError("out of luck")

    study = Pretended(tmp_path, 2, run)
    jobs = jobs_of(["2"], ["supcon", "simclr"], study.scale, seeds=1, trials=2)
    make(study, jobs, float("inf"), at_once=2)
    output = capsys.readouterr().out
    assert "supcon trial 0 failed: out of luck\n" in output
    assert "supcon seed 0 failed: its learning rate is not chosen" in output
    # Last comes what needs the one that failed.
    assert study.started[-1] == Job("supcon") and study.started.count(Job("supcon", trial=0)) == 1
    assert [job for job in jobs if study.record(job) is None] == [
        Job("supcon", trial=0),
        Job("supcon"),
    ]


def test_the_budget_and_the_time_left_of_several_jobs(tmp_path, capsys):
    done, *jobs = [Job("supcon", seed) for seed in range(5)]
    study = Pretended(tmp_path, 1)
    study.do(done)  # in two hours: 60 epochs of two views, a minute a pass
    make(study, [done, *jobs], 3600.0, at_once=2)
    assert study.started == [done]
    assert "left out, the budget is too small: 4 runs, the first supcon seed 1" in (
        capsys.readouterr().out
    )
    make(study, [done, *jobs], float("inf"), at_once=2)
    assert "supcon seed 1 (about 4 h 0 min left, then supcon seed 2)" in capsys.readouterr().out


def test_an_interrupt_kills_what_runs(tmp_path, monkeypatch):
    (tmp_path / "sleep.py").write_text("import time; print('on', flush=True); time.sleep(600)")
    monkeypatch.setattr(processes, "TRAIN", tmp_path)
    monkeypatch.setattr(processes, "_running", processes._Running())
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    found = []

    def run(job: Job) -> None:
        folder = study.folder(job)
        folder.mkdir()
        if job.seed < 2:
            processes.start("sleep.py", folder)
        while len([*tmp_path.glob("*/output.txt")]) < 2:
            time.sleep(0.01)
        while not all(path.read_text() for path in tmp_path.glob("*/output.txt")):
            time.sleep(0.01)
        found.extend(processes._running.processes)
        os.kill(os.getpid(), signal.SIGINT)

    study = Pretended(tmp_path, 1, run)
    done = Job("untrained")
    Pretended(tmp_path, 1).do(done)
    try:
        with pytest.raises(KeyboardInterrupt):
            jobs = [done, *(Job("supcon", seed) for seed in range(4))]
            make(study, jobs, float("inf"), at_once=3)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [process.poll() for process in found] == [-signal.SIGKILL] * 2
    assert Job("supcon", 3) not in study.started
    with pytest.raises(UserError, match="stopped"):  # its next stage does not start either
        processes.start("sleep.py", tmp_path)


def test_jobs_share_the_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    before = torch.get_num_threads()
    try:
        for jobs, threads in ((2, 3), (4, 1), (12, 1)):
            torch.set_num_threads(6)
            processes.share_threads(jobs)
            assert os.environ["OMP_NUM_THREADS"] == str(threads) == str(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def in_this_process(monkeypatch):
    """Run the scripts here, and two corruptions of the fifteen."""

    def run(script: str, folder: Path, **options: object) -> None:
        words = [[f"--{name}", str(value)] for name, value in options.items()]
        import_module(Path(script).stem).main([word for pair in words for word in pair])

    monkeypatch.setattr("reproduction.runs.start", run)
    monkeypatch.setattr("evaluation.corruptions.CORRUPTIONS", ("fog", "pixelate"))


def test_two_stages_of_one_encoder(tmp_path, in_this_process, capsys):
    scale = replace(SCALES["digits"], corruption_images=20)
    local = {"train_images": 200, "device": "cpu", "log": "csv", "width": 4, "model": "resnet10"}
    study = Study(scale, tmp_path, trials=1, epochs=2, local=local)
    two, one = Job("cross_entropy_two_stages"), Job("cross_entropy")
    with pytest.raises(UserError, match="its encoder is not made"):
        study.do(two)
    for job in (one, two, replace(two, corrupted=True)):
        assert study.record(job) is None
        study.do(job)
        assert study.record(job) is not None
    encoders = [open_run(study.folder(job)).network().state_dict() for job in (one, two)]
    torch.testing.assert_close(*encoders, rtol=0, atol=0)
    scores = [study.scores(job)[0] for job in (one, two)]
    assert scores[0].shape == scores[1].shape and not torch.allclose(*scores)
    evaluation = json.loads((study.folder(two) / EVALUATION).read_text())
    assert evaluation["classifier"] == "linear stage (convex)"
    assert study.corruptions(two).keys() >= {"mce", *SEVERITIES}
    assert study.corruptions(one)["mce"] == 1
    # Baselines, too, on the same images.
    raw_pixels = Job("raw_pixels")
    for job in (raw_pixels, replace(raw_pixels, corrupted=True)):
        assert study.record(job) is None
        study.do(job)
        assert study.record(job) is not None
    of_pixels = json.loads((study.folder(raw_pixels) / EVALUATION).read_text())["corruptions"]
    of_run = evaluation["corruptions"]
    assert of_pixels["of"] == of_run["of"] and of_pixels["top1"].keys() == of_run["top1"].keys()
    assert 0 < of_pixels["mean_top1"] < of_pixels["clean_top1"]
    assert study.corruptions(raw_pixels).keys() == study.corruptions(two).keys()
    # One that diverged has no encoder to give.
    record(study, one, 0.0)
    (study.folder(one) / RECORD).write_text(json.dumps({"failed": f"the loss is nan: {REMEDY}"}))
    study.do(two)
    assert study.failed(two)


class Measured(Study):
    """Runs whose scores of images are given: by method and seed the classes that they name."""

    def __init__(self, correct: dict[str, list[float]], images: int = 1000):
        self.correct, self.images = correct, images

    def failed(self, job):
        return self.correct[job.method] == "diverged"

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
    row = judge(Measured({"a": better, "b": worse}), Claim("a", "b"), seeds=3)
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
    assert judge(study, Claim("a", "b", metric="ece"), seeds=3)["verdict"] == "shown"


def test_spread_is_over_all_settings_that_both_have():
    shares = [0.5 + 0.05 * k for k in range(len(SETTINGS))]
    correct = {f"supcon_{setting}": [0.9] * 3 for setting in SETTINGS}
    correct |= {f"cross_entropy_{setting}": [share] * 3 for setting, share in zip(SETTINGS, shares)}
    study = Measured(correct | {"supcon": [0.9] * 3, "cross_entropy": [0.9] * 3})
    assert value(study, Job("supcon"), "spread") == 0
    spread = value(study, Job("cross_entropy"), "spread")
    assert spread == pytest.approx(torch.tensor(shares).std().item(), abs=1e-3)
    claim = Claim("supcon", "cross_entropy", metric="spread")
    assert judge(study, claim, seeds=3)["verdict"] == "shown"
    study.correct["supcon_rate_triple"] = "diverged"
    assert value(study, Job("supcon"), "spread") > spread
    study.correct["supcon_rate_triple"] = []
    assert judge(study, claim, seeds=3)["verdict"] == "not run"


def test_claims_name_methods_of_their_table():
    for table in TABLES.values():
        named = {name for claim in table.claims for name in (claim.better, claim.worse)}
        if "spread" not in {claim.metric for claim in table.claims}:  # which is of all its methods
            assert named <= set(table.methods)
        assert table.published.keys() <= set(table.methods) <= METHODS.keys()
        assert {*table.columns, *(claim.metric for claim in table.claims)} <= METRICS.keys()


def test_tables_and_figures_are_chosen_apart():
    assert paper.PaperOptions(figure=["4"]).asked == ["figure 4"]
    assert paper.PaperOptions(table=["1"], figure=["3"]).asked == ["1", "figure 3"]
    assert paper.PaperOptions().asked == list(TABLES)
    wrong = paper.PaperOptions(table=["figure 3"], figure=["5"]).mistakes()
    assert [mistake.partition(":")[0] for mistake in wrong] == ["--table figure 3", "--figure 5"]


def test_figures_are_drawn_of_the_rows(tmp_path):
    """Rows of before a metric was there are drawn without it."""
    runs = [
        {"scale": "digits", "method": method, "top1": "0.9"} | {name: "0.7" for name in SEVERITIES}
        for method in ("supcon", "cross_entropy")
    ]
    runs += [
        {"scale": "digits", "method": f"{loss}_{setting}", "top1": "0.8"}
        for loss in ("supcon", "cross_entropy")
        for setting in SETTINGS
    ]
    common = {"scale": "digits", "better": "supcon", "worse": "cross_entropy"}
    common |= {"verdict": "not resolved", "needed_images": "5", "needed_seeds": "3"}
    common |= {"difference": "0.1", "low": "-0.1", "high": "0.2"}
    claims = [
        common | {"table": table, "metric": metric}
        for table, metric in (("figure 3", "severity_5"), ("figure 4", "spread"))
    ]
    names = [OVERVIEW, *(name.format("digits") for name in FIGURES.values())]
    assert list(pictures(runs, claims)) == names
    paper.draw(runs, claims, tmp_path)
    assert all((tmp_path / name).stat().st_size > 0 for name in names)
    runs = [row | {name: "0.01" for name in ("commit", "hardware", "torch")} for row in runs]
    page = paper.page(runs, claims)
    assert "| SupCon | 90.00 | 70.00 |" in page
    assert all(f"]({name})" in page for name in names)
    assert pictures(runs, []) == {}


def test_committed_results_stay_beside_those_of_another_folder(tmp_path, monkeypatch):
    readme, root = tmp_path / "README.md", tmp_path / "runs"
    root.mkdir()
    readme.write_text("".join(paper.MARKS))
    for name, path in (("RESULTS", tmp_path), ("PAGE", tmp_path / "paper.md"), ("README", readme)):
        monkeypatch.setattr(paper, name, path)

    def update(top1, seeds):
        runs = [
            dict.fromkeys(RUN_COLUMNS, "")
            | {"scale": "digits", "method": method, "seed": str(seed), "top1": str(reached)}
            for method, reached in top1.items()
            for seed in range(seeds)
        ]
        claims = []
        for claim in TABLES["2"].claims:
            row = dict.fromkeys(CLAIM_COLUMNS, "") | {"scale": "digits", "table": "2"}
            row |= {"better": "supcon", "worse": claim.worse, "metric": "top1"}
            row |= {"seeds": "0", "verdict": "not run"}
            if claim.worse in top1:
                row |= {"seeds": str(seeds), "verdict": "not resolved"}
                row |= {"difference": "0.1", "low": "0", "high": "0.2"}
            claims.append(row)
        monkeypatch.setattr(paper, "rows_of_runs", lambda *about: runs)
        monkeypatch.setattr(paper, "rows_of_claims", lambda *about: claims)
        paper.report(Study(SCALES["digits"], root, 1), paper.PaperOptions(update_docs=True))
        return [read_rows(tmp_path / f"paper_digits_{what}.csv") for what in ("runs", "claims")]

    update({"supcon": 0.9, "simclr": 0.8, "no longer compared": 0.1}, seeds=3)
    update({"supcon": 0.7, "cross_entropy": 0.5}, seeds=2)
    runs, claims = update({}, seeds=0)
    reached = [(row["method"], row["seed"], row["top1"]) for row in runs]
    of_supcon = [("supcon", "0", "0.7"), ("supcon", "1", "0.7"), ("supcon", "2", "0.9")]
    assert sorted(reached[:5]) == [*(("cross_entropy", s, "0.5") for s in "01"), *of_supcon]
    assert reached[5:] == [("simclr", seed, "0.8") for seed in "012"]
    judged = {row["worse"]: row["seeds"] for row in claims if row["seeds"] != "0"}
    assert judged == {"simclr": "3", "cross_entropy": "2"}


def test_the_page_is_that_of_the_committed_results():
    page = paper.page(*paper.committed_rows())
    assert paper.PAGE.read_text() == page, "python train/paper.py --update_docs --budget 0min"
    readme = paper.README.read_text()
    assert paper.between_marks(readme, summary(*paper.committed_rows())) == readme
    drawn = {path.name for path in paper.PAGE.parent.glob("paper*.png")}
    assert drawn == pictures(*paper.committed_rows()).keys()
