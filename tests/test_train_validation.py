"""The validation images of a run: which ones they are, what they choose, and that no others do."""

import json

import pytest
import torch

import train_fixtures  # noqa: F401  puts train/ on the path
from evaluation.embeddings import embed, embed_share, encode_stored
from evaluation.knn import accuracy, knn_predict
from linear import main as linear
from run.errors import UserError
from train_fixtures import metrics, pretrain, write_images
from train_parts import build_model, build_views, load_checkpoint, load_data, options_of


def test_they_are_drawn_from_every_class_by_the_seed_alone():
    whole = load_data(options_of())
    data, again, other = (
        load_data(options_of(validation_fraction=0.2, seed=seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(data.test.images, whole.test.images)
    assert torch.equal(data.validation.images, again.validation.images)
    assert not torch.equal(data.validation.images, other.validation.images)
    counts = [torch.bincount(split.labels) for split in (data.train, data.validation, whole.train)]
    assert torch.equal(counts[0] + counts[1], counts[2])
    assert (counts[1] / counts[2] - 0.2).abs().max() < 0.01
    # Nothing of them is in what the network is told of its training images.
    assert data.mean == [pytest.approx(data.train.images.double().mean().item() / 255)]
    images = torch.cat([data.train.images, data.validation.images])
    assert torch.equal(*(all_.flatten(1).double().sum(0) for all_ in (images, whole.train.images)))


def test_a_single_image_of_a_class_stays_with_the_training_images(tmp_path):
    write_images(tmp_path / "a/train", {"cat": 1, "dog": 2, "owl": 30})
    write_images(tmp_path / "a/val", {"cat": 1, "dog": 1, "owl": 1})
    options = {"dataset": f"imagefolder:{tmp_path / 'a'}", "validation_fraction": 0.1}
    data = load_data(options_of(**options))
    assert torch.bincount(data.train.labels).tolist() == [1, 1, 27]
    assert torch.bincount(data.validation.labels).tolist() == [0, 1, 3]
    files = [split.images.files for split in (data.train, data.validation, data.test)]
    assert len({*files[0], *files[1], *files[2]}) == 36

    write_images(tmp_path / "b/train", {"cat": 1, "dog": 1})
    write_images(tmp_path / "b/val", {"cat": 1, "dog": 1})
    options["dataset"] = f"imagefolder:{tmp_path / 'b'}"
    with pytest.raises(UserError, match=r"^--validation_fraction 0\.1: no class of imagefolder"):
        load_data(options_of(**options))


@pytest.fixture
def encoded(monkeypatch):
    """The number of images of each split that a run encodes, in order."""
    sizes = []

    for act in (embed, embed_share):

        def spy(encode, split, act=act, **options):
            sizes.append(len(split))
            return act(encode, split, **options)

        monkeypatch.setattr(f"evaluation.evaluator.{act.__name__}", spy)
    monkeypatch.setattr("pretrain.draw", lambda *arguments: None)
    return sizes


SHORT = ("--batch_size", 256, "--epochs", 3, "--knn_every", 1)


def test_they_choose_the_best_and_the_test_images_are_seen_once(tmp_path, encoded, capsys):
    vote = ("--knn_k", 3, "--knn_temperature", 0.5)
    run = pretrain(tmp_path, *SHORT, *vote, "--validation_fraction", 0.2, "--seed", 1)
    # Before the first step, after each of three epochs, and at the end.
    assert encoded == [269, 1078] * 4 + [450]
    recorded = [float(row["knn_accuracy"]) for row in metrics(run) if row["knn_accuracy"]]
    best = load_checkpoint(run / "best.pt")["state"]
    assert best["best"] == best["accuracy"] == pytest.approx(max(recorded[1:]))

    saved = load_checkpoint(run / "last.pt")
    config = options_of(**saved["config"])
    data = load_data(config)
    model = build_model(config, channels=1)
    model.load_state_dict(saved["model"])
    model.to(memory_format=config.network.memory_format)
    with torch.no_grad():
        rows = [
            encode_stored(model, build_views(config, data), split.images)
            for split in (data.train, data.validation, data.test)
        ]
    expected = [
        accuracy(
            knn_predict(
                part, rows[0], data.train.labels, num_classes=10, neighbours=3, temperature=0.5
            ),
            split.labels,
        )
        for part, split in zip(rows[1:], (data.validation, data.test))
    ]
    results = json.loads((run / "results.json").read_text())
    assert results["evaluated_on"] == "validation"
    assert [results["knn_accuracy"], results["test_knn_accuracy"]] == expected
    said = capsys.readouterr().out
    assert "1078 training, 269 validation and 450 test images" in said
    assert f"k-NN {expected[1]:.2%} on 450 test images" in said

    top1 = linear(["--checkpoint", str(run / "best.pt"), "--device=cpu"])
    written = json.loads((run / "linear.json").read_text())
    assert written["top1"] == top1 and 0 < written["top1_validation"] <= 1
    assert f"on {len(data.test)} test images" in capsys.readouterr().out


def test_without_them_nothing_is_chosen_and_nothing_encoded_again(tmp_path, encoded):
    run = pretrain(tmp_path, *SHORT, "--probe", "true")
    assert encoded == [450, 1347] * 4
    assert not (run / "best.pt").exists()
    results = json.loads((run / "results.json").read_text())
    assert results["evaluated_on"] == "test"
    for kind in ("knn", "probe"):
        assert results[f"{kind}_accuracy"] == results[f"test_{kind}_accuracy"]
    # A run that is over encodes for its pictures alone.
    encoded.clear()
    pretrain(tmp_path, *SHORT, "--probe", "true", "--resume", run)
    assert encoded == [450, 1347]
