"""evaluate.py: each measure against its definition, and files that are whole, resumed and shared out."""

import csv
import json
import multiprocessing
import os
import shutil
import socket
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_fixtures  # noqa: F401  puts train/ on the path
from data.corrupted import CORRUPTIONS, SEVERITIES, Corrupted
from data.images import Split
from evaluate import main
from evaluation import corruptions, runs
from evaluation.classification import classify
from evaluation.corruptions import compare
from evaluation.embeddings import encode_stored
from evaluation.retrieval import retrieve
from linear import main as fit_linear
from linear_stage.classifier import load_classifier, save_classifier
from run.command_line import run_script
from run.device import DeviceOptions
from train_fixtures import pretrain, write_images
from train_parts import build_model, build_views, load_data, options_of

CROSS_ENTROPY = ("--method", "cross_entropy", "--max_steps", 20)
FEW = ("gaussian_noise", "fog", "contrast")
SHORT = ["--corruption_images=6", "--corruption_side=32", "--device=cpu"]
PLAIN = ["--no_corruptions", "--device=cpu"]


def evaluate(*arguments: object) -> list[dict]:
    """What evaluate.py writes of each run."""
    return [json.loads(path.read_text()) for path in main([*map(str, arguments)])]


def error_of(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        run_script(partial(main, [*map(str, arguments)]))
    error = capsys.readouterr().err
    assert ended.value.code in (1, 2) and error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with its own classifier, one with a linear stage, and one on other images."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_images(folder / "images", {"cat": 8, "dog": 8})
    images = ("--dataset", f"imagefolder:{folder / 'images'}", "--val_fraction", 0.25)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.draw", lambda *of: None)  # takes longer than the rest
        pretrain(folder, *CROSS_ENTROPY, "--name=ce")
        pretrain(folder, *CROSS_ENTROPY, *images, "--batch_size=8", "--name=other")
        supcon = pretrain(folder, "--max_steps", 10, "--name=supcon")
    fit_linear(["--checkpoint", str(supcon), "--device=cpu"])
    return folder


@pytest.fixture(autouse=True)
def few_corruptions(monkeypatch):
    """Of the library's all are tested without a network."""
    monkeypatch.setattr(corruptions, "CORRUPTIONS", FEW)


@pytest.fixture
def copy(folder, tmp_path, monkeypatch):
    """Copies of runs that a test may change, of which no pictures are drawn."""
    monkeypatch.setattr(runs, "draw_page", lambda *of: None)
    ignore = shutil.ignore_patterns("evaluation.*")
    return lambda name, new: shutil.copytree(folder / name, tmp_path / new, ignore=ignore)


def test_two_runs_side_by_side(folder, capsys):
    before = {path: path.read_bytes() for path in folder.rglob("*.pt")}
    checkpoints = ("--checkpoint", folder / "ce", folder / "supcon")
    found = evaluate(*checkpoints, "--baseline", folder / "ce", "--transfer=digits", *SHORT)
    assert {path: path.read_bytes() for path in folder.rglob("*.pt")} == before
    ce, supcon = found
    for one in found:
        assert one["classification"].keys() == {
            "top1", "top5", "nll", "ece", "per_class", "reliability"
        }  # fmt: skip
        assert (folder / one["run"] / "evaluation.png").stat().st_size > 0
        tested = one["corruptions"]
        assert tuple(tested["top1"]) == FEW and tested["of"]["images"] == 6
        assert one["baseline"]["run"] == "ce"
    assert ce["baseline"]["mce"] == ce["baseline"]["relative_mce"] == 1
    assert "cross_entropy" in ce["classifier"] and "linear stage" in supcon["classifier"]
    # The images of its own test set, classified as the linear stage says of them.
    top1 = json.loads((folder / "supcon" / "linear.json").read_text())["top1"]
    assert supcon["classification"]["top1"] == pytest.approx(top1, abs=1e-6)
    assert supcon["transfer"]["digits"]["linear"] == pytest.approx(top1, abs=0.01)

    table = list(csv.DictReader((folder / "comparison.csv").read_text().splitlines()))
    assert [row["run"] for row in table] == ["ce", "supcon"]
    assert float(table[1]["corrupted top-1 of 6 images"]) == supcon["corruptions"]["mean_top1"]
    assert float(table[1]["mCE"]) == supcon["baseline"]["mce"]
    markdown = (folder / "comparison.md").read_text()
    assert markdown.count("\n") == 4 and "| supcon | supcon | linear stage (convex) |" in markdown
    assert markdown in capsys.readouterr().out


def test_own_classifier_is_the_one_that_was_trained(folder):
    (found,) = evaluate("--checkpoint", folder / "ce", *PLAIN)
    saved = torch.load(folder / "ce/last.pt", weights_only=True)
    options = options_of(image_size=8, model="resnet10", width=4)
    model, data = build_model(options, channels=1), load_data(options)
    model.load_state_dict(saved["model"])
    weight, bias = (saved["method"][f"classifier.{name}"] for name in ("weight", "bias"))
    with torch.no_grad():
        embedded = encode_stored(model, build_views(options, data), data.test.images)
    hits = F.linear(embedded, weight, bias).argmax(1) == data.test.labels
    assert found["classification"]["top1"] == pytest.approx(hits.double().mean().item(), abs=1e-6)


def test_what_was_tested_before_is_kept_for_the_same_weights(copy, monkeypatch):
    run, whole = (copy("ce", name) for name in ("run", "whole"))
    tested, top1 = [], corruptions.top1

    def count(scores, labels):
        if len(tested) == 8:
            raise KeyboardInterrupt
        tested.append(len(labels))
        return top1(scores, labels)

    monkeypatch.setattr(corruptions, "top1", count)
    with pytest.raises(KeyboardInterrupt):
        evaluate("--checkpoint", run, *SHORT)
    partial_ = json.loads((run / "evaluation.json").read_text())
    assert sum(len(shares) for shares in partial_["corruptions"]["top1"].values()) == 8
    # What is not tested now stays, too.
    evaluate("--checkpoint", run, *PLAIN)

    monkeypatch.setattr(corruptions, "top1", lambda *seen: tested.append(0) or top1(*seen))
    (resumed,) = evaluate("--checkpoint", run, *SHORT)
    assert len(tested) == 15
    (straight,) = evaluate("--checkpoint", whole, *SHORT)
    assert resumed | {"run": "whole"} == straight and len(tested) == 30

    evaluate("--checkpoint", run, *SHORT)
    assert len(tested) == 30
    for other in (["--corruption_images=5"], ["--corruption_side=40"]):
        evaluate("--checkpoint", whole, *SHORT, *other)
    assert len(tested) == 60
    saved = torch.load(run / "last.pt", weights_only=True)
    saved["model"]["encoder.conv1.weight"] *= 2
    torch.save(saved, run / "last.pt")
    evaluate("--checkpoint", run, *SHORT)
    assert len(tested) == 75


def rank(number: int, port: int, run: Path) -> None:
    """One of two processes as torchrun starts them."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    corrupted, corrupt = [], Corrupted._corrupt

    def count(self, images, places):
        corrupted.extend(places)
        return corrupt(self, images, places)

    Corrupted._corrupt = count
    small_batches()
    evaluate("--checkpoint", run, *SHORT)
    # Two batches of two images each, of three batches.
    assert len(corrupted) == len(FEW) * len(SEVERITIES) * 4


def small_batches() -> None:
    """Of images and of queries such that they do not come out even; few corruptions, no picture."""
    corruptions.CORRUPTIONS, corruptions.BATCH_SIZE = FEW, 2
    runs.retrieve = partial(retrieve, queries=100)
    runs.draw_page = lambda *of: None


def test_two_processes_write_what_one_does(copy, monkeypatch):
    for module, name in ((corruptions, "BATCH_SIZE"), (runs, "retrieve"), (runs, "draw_page")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back at the end
    run = copy("ce", "run")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Not forked: after a parallel region a child of this process would wait for its threads.
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=rank, args=(number, port, run)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    together = (run / "evaluation.json").read_bytes()
    (run / "evaluation.json").unlink()
    small_batches()
    evaluate("--checkpoint", run, *SHORT)
    assert (run / "evaluation.json").read_bytes() == together


def images(channels: int, size: int) -> Split:
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (5, channels, size, size), generator=rng, dtype=torch.uint8)
    return Split(pixels, torch.arange(5))


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 8), (3, 48)])
def test_corrupted_image_depends_on_its_place_alone(channels, size):
    split = images(channels, size + 2)
    before = np.random.get_state()[1].copy()
    for name in CORRUPTIONS:
        at = [Corrupted(split, name, severity, size, 32) for severity in (1, 5)]
        (mild, labels), (harsh, _) = (one[[0, 1, 2, 3]] for one in at)
        assert mild.shape == (4, channels, size, size) and mild.dtype == torch.uint8
        assert labels.tolist() == [0, 1, 2, 3] and at[0].image_bytes == mild[0].numel()
        assert torch.equal(at[0][[3, 1]][0], mild[[3, 1]])
        assert not torch.equal(mild, harsh)
    assert np.array_equal(np.random.get_state()[1], before)


def test_corruptions_are_those_of_the_library():
    from imagecorruptions import get_corruption_names

    assert list(CORRUPTIONS) == get_corruption_names("common")


def test_grey_images_get_the_noise_of_one_channel():
    grey = Split(torch.full((1, 1, 64, 64), 128, dtype=torch.uint8), torch.zeros(1))
    (noisy, _) = Corrupted(grey, "gaussian_noise", 1, 64, 32)[[0]]
    assert (noisy.float() / 255).std().item() == pytest.approx(0.08, rel=0.05)


def test_mean_corruption_errors():
    def tested(clean, *shares):
        by_severity = {str(severity): shares[0] for severity in SEVERITIES}
        found = {name: by_severity for name in FEW}
        found["fog"] = {str(severity): shares[-1] for severity in SEVERITIES}
        return {"clean_top1": clean, "top1": found}

    found = compare(tested(0.9, 0.6, 0.8), tested(0.8, 0.6))
    assert found["ce"]["contrast"] == 1 and found["ce"]["fog"] == 0.5
    assert found["mce"] == pytest.approx((2 + 0.5) / 3, abs=1e-6)
    assert found["relative_ce"]["contrast"] == 1.5 and found["relative_ce"]["fog"] == 0.5
    # Fog costs the baseline nothing: there is no share of it.
    found = compare(tested(0.9, 0.6, 0.8), tested(0.8, 0.6, 0.8))
    assert found["relative_ce"]["fog"] is None and found["relative_mce"] == 1.5


def test_classification_by_its_definitions():
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(200, 7, generator=generator)
    labels = torch.randint(6, (200,), generator=generator)  # none of the last class
    found = classify(scores, labels, list("abcdefg"))
    hits = scores.argsort(1, descending=True) == labels[:, None]
    about = partial(pytest.approx, abs=2e-6)
    assert found["top1"] == about(hits[:, 0].double().mean().item())
    assert found["top5"] == about(hits[:, :5].any(1).double().mean().item())
    assert found["nll"] == about(F.cross_entropy(scores, labels).item())
    assert found["per_class"]["b"] == about(hits[labels == 1, 0].double().mean().item())
    assert found["per_class"]["g"] is None
    bins = found["reliability"]
    gaps = [one["images"] * abs(one["confidence"] - one["accuracy"]) for one in bins]
    assert found["ece"] == about(sum(gaps) / 200) and len(bins) > 5
    assert sum(one["images"] for one in bins) == 200


def test_retrieval_by_its_definition():
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(60, 3, generator=generator)
    labels = torch.randint(5, (60,), generator=generator)
    labels[7] = 5  # alone in its class: it asks nothing, and stands in the way of others
    similar = F.normalize(embeddings, dim=1) @ F.normalize(embeddings, dim=1).T
    recalls, precisions = {1: [], 2: [], 4: [], 8: []}, []
    for query in range(60):
        order = [k for k in similar[query].argsort(descending=True).tolist() if k != query]
        right = labels[order] == labels[query]
        if num_right := int(right.sum()):
            for k, found in recalls.items():
                found.append(bool(right[:k].any()))
            shares = right.double().cumsum(0) / torch.arange(1, 60)
            precisions.append(float((shares * right)[:num_right].sum()) / num_right)
    expected = {f"recall@{k}": np.mean(found) for k, found in recalls.items()}
    expected["map@r"] = np.mean(precisions)
    for queries in (7, 1000):
        found = retrieve(embeddings, labels, queries=queries)
        assert found == pytest.approx(expected, abs=1e-6)
    assert set(retrieve(embeddings[:3], torch.arange(3)).values()) == {None}


def test_fine_tuned_classifier_sees_its_own_encoder(folder, copy):
    run = copy("supcon", "tuned")
    (frozen,) = evaluate("--checkpoint", run, *PLAIN)
    classifier = load_classifier(run / "linear.pt")
    encoder = torch.load(folder / "ce/last.pt", weights_only=True)["model"]
    classifier.encoder = {
        name.removeprefix("encoder."): value
        for name, value in encoder.items()
        if name.startswith("encoder.")
    }
    save_classifier(run, classifier)
    (tuned,) = evaluate("--checkpoint", run, *PLAIN)
    assert tuned["classification"] != frozen["classification"]
    assert tuned["retrieval"] == frozen["retrieval"] and "fine-tuned" in tuned["classifier"]


def test_runs_that_cannot_be_evaluated_are_named(folder, copy, capsys):
    run = copy("supcon", "run")
    classifier = load_classifier(run / "linear.pt")
    classifier.step = 9
    save_classifier(run, classifier)
    error = error_of(capsys, "--checkpoint", run, *PLAIN)
    assert f"was made of step 9, {run / 'last.pt'} is of step 10: run python" in error
    (run / "linear.pt").unlink()
    error = error_of(capsys, "--checkpoint", run, *PLAIN)
    assert f"{run / 'last.pt'} has no classifier: run python train/linear.py --checkpoint" in error
    baseline = ("--checkpoint", folder / "ce", "--baseline", folder / "other")
    error = error_of(capsys, *baseline, *SHORT)
    assert f"{folder / 'other/last.pt'} has other test images" in error
    photos = f"--transfer=imagefolder:{folder}"
    error = error_of(capsys, "--checkpoint", folder / "ce", photos, *PLAIN)
    assert "no val/ folder: hold images out by --transfer_val_fraction 0.1" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--baseline=x", "--no_corruptions"], "--baseline contradicts --no_corruptions"),
        (["--transfer=mnist"], "--transfer mnist: accepted are digits"),
        (["--transfer_val_fraction=0.1"], "--transfer_val_fraction needs --transfer"),
        (["--corruption_side=16"], "--corruption_side 16: must be at least 32"),
    ],
)
def test_wrong_options_are_named(capsys, arguments, message):
    assert message in error_of(capsys, "--checkpoint", "x", *arguments)


def test_all_runs_are_computed_alike(monkeypatch):
    asked = []
    monkeypatch.setattr("evaluate.set_arithmetic", lambda options, device: asked.append(options))
    monkeypatch.setattr(runs, "evaluate", lambda *of: [])
    main(["--checkpoint", "x", "--device=cpu"])
    assert asked == [DeviceOptions()]


def test_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setattr("run.extras.find_spec", lambda name: None)
    error = error_of(capsys, "--checkpoint", "x")
    assert "torchmetrics" in error and 'pip install -e ".[evaluate]"' in error
