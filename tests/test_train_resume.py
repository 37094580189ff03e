"""What may change when a run goes on, and that what would change its past is refused."""

import json
import shutil

import pytest
import torch

import train_fixtures  # noqa: F401  puts train/ on the path
from run.errors import UserError
from run.resume import describe_machine, with_its_warmup
from train_fixtures import metrics, pretrain, weights, write_images
from train_parts import options_of

# Epochs of five steps on digits, of which none changes the rate.
OPTIONS = ("--batch_size", 256, "--epochs", 3, "--schedule", "step", "--decay_epochs", "[9]")


@pytest.fixture(scope="module", autouse=True)
def without_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.draw", lambda *arguments: None)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 12 steps, evaluated at its end alone."""
    return pretrain(tmp_path_factory.mktemp("whole"), *OPTIONS, "--max_steps", 12)


@pytest.fixture
def cut_short(tmp_path):
    """A run of 7 steps."""
    return pretrain(tmp_path, *OPTIONS, "--max_steps", 7, "--save_every", 3, "--keep", 9)


def rates(run):
    return [float(row["learning_rate"]) for row in metrics(run) if row["loss"]]


def test_extended_run_ends_like_one_that_was_always_as_long(whole, cut_short, monkeypatch, capsys):
    assert metrics(cut_short)[-1]["step"] == "7" and metrics(cut_short)[-1]["knn_accuracy"]
    pretrain(cut_short, *OPTIONS, "--max_steps", 12, "--save_every", 2, "--resume", cut_short)
    assert metrics(cut_short) == metrics(whole)
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(cut_short).items())
    assert (cut_short / "config.yaml").read_text().count("max_steps: 12\n") == 1
    # Once it is longer, it is so for good. What of the machine differs is said.
    said = capsys.readouterr().err
    assert "warning: the run now ends after step 12, not 7 as before" in said
    assert "last bits" not in said
    machine = describe_machine(torch.device("cpu"), 1) | {"torch": "9.9"}
    monkeypatch.setattr("run.resume.describe_machine", lambda *arguments: machine)
    pretrain(cut_short, *OPTIONS, "--max_steps", 12, "--resume", cut_short)
    assert metrics(cut_short) == metrics(whole)
    warning = f"so the last bits may differ: torch is 9.9, was {torch.__version__}\n"
    assert capsys.readouterr().err.count(warning) == 1


def test_shortened_run_is_evaluated_where_it_ends(cut_short):
    resume = ("--resume", cut_short / "step-6.pt")
    with pytest.raises(UserError, match=r"has made 6 steps, and --epochs 1.* end after 5$"):
        pretrain(cut_short, *OPTIONS, "--epochs", 1, *resume)
    # After the whole epoch that its first checkpoint of an epoch ends, which nothing evaluated.
    resume = ("--resume", cut_short / "step-5.pt")
    pretrain(cut_short, *OPTIONS, "--epochs", 1, *resume)
    rows = metrics(cut_short)
    assert [row["step"] for row in rows if row["knn_accuracy"]] == ["0", "5"]
    results = json.loads((cut_short / "results.json").read_text())
    assert (results["steps"], results["epochs"]) == (5, 1)
    assert results["knn_accuracy"] == pytest.approx(float(rows[-1]["knn_accuracy"]))


def test_schedule_follows_the_new_length_and_the_warmup_stays(tmp_path):
    def trained(folder, *options):
        return pretrain(folder, "--batch_size", 256, *options)

    run = trained(tmp_path / "a", "--epochs", 2, "--warmup_epochs", 1)
    before = rates(run)
    # 2 is the default of three epochs: as if none was given.
    longer = ("--epochs", 3, "--knn_every", 1)
    trained(tmp_path / "a", *longer, "--warmup_epochs", 2, "--resume", run)
    expected = rates(trained(tmp_path / "b", *longer, "--warmup_epochs", 1))
    assert rates(run) == before + expected[10:]
    assert before != expected[:10]
    with pytest.raises(UserError, match="--warmup_epochs is 0, was 1"):
        trained(tmp_path / "a", *longer, "--resume", run)


def test_warmup_that_is_not_asked_for_is_that_of_the_run():
    saved = options_of(epochs=10, warmup_epochs=2)
    for given, expected in ({"epochs": 60}, 2), ({"epochs": 60, "warmup_epochs": 7}, 7):
        assert with_its_warmup(options_of(**given), saved).schedule.warmup == expected


def test_images_may_have_moved_but_not_changed(tmp_path):
    write_images(tmp_path / "here", {"cat": 8, "dog": 8})
    options = ("--val_fraction", 0.25, "--batch_size", 4, "--max_steps", 2, "--method", "simclr")
    run = pretrain(tmp_path, "--dataset", f"imagefolder:{tmp_path / 'here'}", *options)
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = ("--dataset", f"imagefolder:{tmp_path / 'there'}", *options, "--resume", run)
    before = metrics(run)
    pretrain(tmp_path, *moved)
    assert metrics(run) == before
    (tmp_path / "there/cat/0.png").rename(tmp_path / "there/cat/x.png")
    with pytest.raises(UserError, match=r"not those that it was trained on \(another order\)"):
        pretrain(tmp_path, *moved)
    with pytest.raises(UserError, match="--dataset is digits, was imagefolder:"):
        pretrain(tmp_path, "--batch_size", 4, "--method", "simclr", "--resume", run)
