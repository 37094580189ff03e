"""The linear stage: what its classifiers are, what chooses them, and what it reads and writes."""

import errno
import json
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import train_fixtures  # noqa: F401  puts train/ on the path
from evaluation.embeddings import EMBED_BATCH_SIZE, encode_stored
from linear import main
from linear_stage import features
from linear_stage.classifier import load_classifier
from linear_stage.options import LinearOptions
from linear_stage.paper_protocol import PaperOptions
from linear_stage.stage import LinearStage
from pretend_cuda import pretend_cuda
from run.command_line import parse, run_script
from run.errors import UserError
from run.saved_run import open_run
from train_fixtures import pretrain
from train_parts import build_views, load_data
from training.optimizer import OptimizerOptions, build_optimizer

PAPER = ("--protocol", "paper", "--epochs", 3, "--warmup_epochs", 0)
HOLD_OUT = ("--validation_fraction", 0.2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a few steps on digits, without validation images."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.draw", lambda *arguments: None)
        return pretrain(folder, "--epochs", 2, "--probe", "false")


def read(*options):
    return parse(LinearOptions, ["--checkpoint", "x", *options], prog="linear", description="")


def stage(run, *options):
    """Run linear.py; returns what it wrote: its numbers and its classifier."""
    main(["--checkpoint", str(run), "--device=cpu", *map(str, options)])
    return json.loads((run / "linear.json").read_text()), load_classifier(run / "linear.pt")


def embeddings(run, split_name, encoder=None, **options):
    """Those of a split's plain images, by the encoder of the run or another, and the labels."""
    saved = open_run(run)
    data = load_data(saved.options.changed(**options))
    split, model = getattr(data, split_name), saved.network()
    if encoder is not None:
        model.encoder.load_state_dict(encoder)
    with torch.no_grad():
        return encode_stored(model, build_views(saved.options, data), split.images), split.labels


def shares(classifier, embedded, labels):
    order = classifier.logits(embedded).argsort(1, descending=True)
    hits = order == labels[:, None]
    return hits[:, 0].double().mean().item(), hits[:, :5].sum().item() / len(labels)


def test_convex_fit_is_the_logistic_regression_of_scikit_learn(run, capsys):
    found, classifier = stage(run, "--weight_decay", 0.01)
    rows, labels = (part.double().numpy() for part in embeddings(run, "train"))
    mean, std = rows.mean(0), rows.std(0, ddof=1).clip(1e-6)
    # Its C weighs the sum of the losses.
    peer = LogisticRegression(C=1 / (0.01 * len(rows)), tol=1e-6, max_iter=2000)
    peer.fit((rows - mean) / std, labels)
    weight = classifier.weight.numpy() * std
    np.testing.assert_allclose(weight, peer.coef_, atol=4e-3)
    assert found["converged"] and found["protocol"] == "convex"
    said = capsys.readouterr().out
    assert f"converged after {found['iterations']} iterations of L-BFGS" in said
    top1, top5 = shares(classifier, *embeddings(run, "test"))
    assert (found["top1"], found["top5"]) == (pytest.approx(top1), pytest.approx(top5))
    assert f"linear top-1 {top1:.2%}, top-5 {top5:.2%} on 450 test images" in said
    assert top5 > top1 > 0.3 and not classifier.unit_length and classifier.encoder is None


def test_a_fit_that_stops_too_soon_says_so(run, capsys):
    found, _ = stage(run, "--max_iterations", 3)
    assert not found["converged"]
    said = capsys.readouterr().out
    assert "warning: not converged after 3 iterations" in said and "--max_iterations" in said


def test_features_in_a_file_give_what_those_in_memory_give(run, monkeypatch):
    found, classifier = stage(run, "--weight_decay", 0.01)
    monkeypatch.setattr(features, "CHUNK", 300)
    made, most = [], []
    in_file = features._in_file

    def spy(model, views, images):
        most.append(len(images))
        return encode_stored(model, views, images)

    monkeypatch.setattr(features, "_in_file", lambda *how: made.append(how) or in_file(*how))
    monkeypatch.setattr("linear_stage.stage.encode_stored", spy)
    before = sorted(run.iterdir())
    again, mapped = stage(run, "--weight_decay", 0.01, "--features_gib", 0)
    assert made == [((1347, 32), run)] and sorted(run.iterdir()) == before
    assert max(most) <= EMBED_BATCH_SIZE
    # The optimum is one; how near to it a fit ends depends on how its sums are rounded.
    assert torch.dist(mapped.weight, classifier.weight) < 0.01 * classifier.weight.norm()
    assert again["top1"] == pytest.approx(found["top1"], abs=0.005)


def error_of(capsys, run, *options):
    with pytest.raises(SystemExit) as ended:
        run_script(partial(stage, run, *options))
    error = capsys.readouterr().err
    assert ended.value.code == 1 and error.startswith("error: ") and error.count("\n") == 1
    return error


def test_a_machine_without_room_is_named_in_one_line(run, monkeypatch, capsys):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    def out_of_memory(*arguments, **options):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", full, raising=False)
        error = error_of(capsys, run, "--features_gib", 0)
    assert f"{run} cannot hold 0.0 GiB of features" in error and "--features_gib" in error
    with monkeypatch.context() as patch:
        patch.setattr("linear.replace_text", full)
        error = error_of(capsys, run)
    assert f"cannot write to {run}: No space left on device" in error
    with monkeypatch.context() as patch:
        patch.setattr("linear.tempfile.TemporaryFile", full)
        patch.setattr("linear.LinearStage", lambda *arguments: pytest.fail("it takes long"))
        error = error_of(capsys, run)
    assert f"cannot write to {run}: No space left on device" in error
    with monkeypatch.context() as patch:
        patch.setattr("linear_stage.stage.Features", out_of_memory)
        error = error_of(capsys, run)
    assert "out of memory: lower one of --features_gib 8.0" in error


@pytest.fixture
def seen(monkeypatch):
    """The number of images of each split that is encoded as it is, in order."""
    sizes = []
    monkeypatch.setattr(
        "linear_stage.stage.embedded_batches",
        lambda encode, split, **how: (
            sizes.append(len(split)) or features.embedded_batches(encode, split, **how)
        ),
    )
    return sizes


def test_validation_images_choose_and_the_test_images_are_seen_once(run, seen, capsys):
    options = ("--learning_rate", "[0.01,5]", "--weight_decay", "[0,0.1]", *HOLD_OUT)
    found, classifier = stage(run, *PAPER, *options)
    # All four at once, by one frozen encoder; the test images at the end.
    assert seen == [269, 450]
    assert [(t["learning_rate"], t["weight_decay"]) for t in found["trials"]] == [
        (0.01, 0), (0.01, 0.1), (5, 0), (5, 0.1)
    ]  # fmt: skip
    best = max(found["trials"], key=lambda trial: trial["top1_validation"])
    assert best["learning_rate"] == 5 and best.items() <= found.items()
    for name in ("test", "validation"):
        top1, top5 = shares(classifier, *embeddings(run, name, validation_fraction=0.2))
        suffix = "" if name == "test" else "_validation"
        assert found[f"top1{suffix}"] == pytest.approx(top1)
        assert found[f"top5{suffix}"] == pytest.approx(top5)
    assert classifier.unit_length and classifier.encoder is None and found["top1"] > 0.2
    said = capsys.readouterr().out
    assert "chosen of 4 on 269 validation images: --learning_rate 5.0" in said
    # A candidate among others is trained as it would be alone.
    rate, decay = best["learning_rate"], best["weight_decay"]
    alone = ("--learning_rate", rate, "--weight_decay", decay, *HOLD_OUT)
    torch.testing.assert_close(stage(run, *PAPER, *alone)[1].weight, classifier.weight)


def test_finetuning_trains_the_encoder_by_its_own_rate(run, seen):
    before = (run / "last.pt").read_bytes()
    options = ("--max_steps", 6, "--finetune", *HOLD_OUT, "--encoder_learning_rate")
    found, classifier = stage(run, *PAPER, *options, 0.05, "--learning_rate", "[0.001,5]")
    # Each rate begins with the encoder of the run.
    assert seen == [269, 269, 450] and found["encoder_learning_rate"] == 0.05
    assert found["learning_rate"] == 5
    alone = stage(run, *PAPER, *options, 0.05, "--learning_rate", 5)[1]
    torch.testing.assert_close(alone.encoder, classifier.encoder)
    assert (run / "last.pt").read_bytes() == before

    rows, labels = embeddings(run, "test", classifier.encoder, validation_fraction=0.2)
    assert found["top1"] == pytest.approx(shares(classifier, rows, labels)[0])
    start = open_run(run).network().encoder
    still = stage(run, *PAPER, *options, 1e-12, "--learning_rate", 5)[1].encoder
    for name, weight in start.named_parameters():
        torch.testing.assert_close(still[name], weight.detach())
    assert not torch.equal(classifier.encoder["conv1.weight"], start.conv1.weight)


@pytest.mark.parametrize("finetune", ["--finetune", "--no_finetune"])
def test_host_does_not_wait_for_a_gpu_in_its_steps(run, finetune):
    saved, waits = open_run(run), []
    data = load_data(saved.options)
    for steps in (2, 5):  # of one epoch, which waits to print its loss
        options = ("--protocol=paper", f"--max_steps={steps}", finetune)
        with pretend_cuda() as device:
            made = LinearStage(read(*options), saved, data, torch.device("cuda"))
            model = saved.network().to("cuda")
            device.reset()
            made.train(model)
            waits.append(device.waits.total())
    assert waits[0] == waits[1]


def test_features_in_a_file_are_fitted_on_a_gpu(run):
    saved = open_run(run)
    with pretend_cuda():
        options = read("--max_iterations=2", "--features_gib=0")
        made = LinearStage(options, saved, load_data(saved.options), torch.device("cuda"))
        assert made.fit(saved.network().to("cuda")).classifier.is_finite


def test_rates_without_validation_images_are_refused(run):
    with pytest.raises(UserError, match=r"^2 pairs of --learning_rate .* --validation_fraction"):
        stage(run, *PAPER, "--learning_rate", "[1,5]")


def test_a_loss_that_is_not_finite_is_told(run, capsys):
    with pytest.raises(UserError, match=r"^--learning_rate \[1e\+38\]: the loss is not finite"):
        stage(run, *PAPER, "--learning_rate", "[1e38]", "--unit_length", "false")
    # Another candidate is unharmed.
    rates = ("--learning_rate", "[1e38,1]", "--unit_length", "false", *HOLD_OUT)
    found, _ = stage(run, *PAPER, *rates)
    assert found["learning_rate"] == 1 and found["trials"][0]["top1_validation"] is None


def test_classifier_file_holds_plain_tensors(run, tmp_path):
    _, classifier = stage(run)
    saved = torch.load(run / "linear.pt", weights_only=True)
    assert list(saved) == ["weight", "bias", "unit_length", "protocol", "encoder", "step"]
    assert saved["weight"].shape == (10, 32) and saved["bias"].shape == (10,)
    assert saved["step"] == classifier.step == open_run(run).state.step
    torch.save({"weight": saved["weight"]}, tmp_path / "linear.pt")
    with pytest.raises(UserError, match=r"linear\.pt was not written by linear\.py"):
        load_classifier(tmp_path / "linear.pt")
    torch.save(saved | {"more": 1}, tmp_path / "linear.pt")
    with pytest.raises(UserError, match=r"linear\.pt is damaged"):
        load_classifier(tmp_path / "linear.pt")


def test_rmsprop_has_another_eps_in_each_stage():
    layer = torch.nn.Linear(3, 2)
    [candidate] = PaperOptions("rmsprop").candidates([0.0])
    for options, eps in ((candidate, 0.001), (OptimizerOptions("rmsprop"), 1.0)):
        assert build_optimizer(options, layer).param_groups[0]["eps"] == eps
    assert len(PaperOptions("lars", [1.0, 2.0]).candidates([0.0, 0.1])) == 4


def test_views_of_the_linear_stage():
    assert PaperOptions().views("cifar10").augment == "crop_flip"
    assert PaperOptions().views("digits").augment == "digits"
    assert PaperOptions(augment="simclr").views("digits").augment == "simclr"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--finetune"], "--finetune contradicts --protocol convex"),
        (["--batch_size=64"], "--batch_size contradicts --protocol convex"),
        (["--epochs=9"], "--epochs contradicts --protocol convex"),
        (["--weight_decay=[0,1]"], "--weight_decay [0.0, 1.0]: several need --protocol paper"),
        (["--weight_decay=-1"], "--weight_decay -1.0: must be at least 0"),
        (["--protocol=paper", "--max_iterations=9"], "--max_iterations contradicts --protocol paper"),
        (["--protocol=paper", "--learning_rate=[]"], "--learning_rate []: must be greater than 0"),
        (["--protocol=paper", "--label_smoothing=1"], "--label_smoothing 1.0: must be at least 0"),
        (["--protocol=paper", "--rmsprop_eps=1"], "--rmsprop_eps contradicts --optimizer momentum"),
        (["--protocol=paper", "--encoder_learning_rate=1"], "needs --finetune"),
        (["--protocol=paper", "--min_crop_area=0"], "--min_crop_area 0.0: must be greater than 0"),
        (["--protocol=paper", "--final_learning_rate=6"], "most the lowest learning rate, 5.0"),
        (["--validation_fraction=1"], "--validation_fraction 1.0: must lie between 0 and 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_mistakes_exit_with_code_2(argv, message, capsys):
    with pytest.raises(SystemExit) as ended:
        read(*argv)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1
