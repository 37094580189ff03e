"""The linear probe: it learns, is recorded, and the encoder does not notice it."""

import json

import pytest
import torch

import train_fixtures  # noqa: F401  puts train/ on the path
from evaluation.embeddings import encode_stored
from evaluation.probe import Probe
from train_fixtures import metrics, pretrain
from train_parts import build_model, build_views, load_checkpoint, load_data, options_of

CPU = torch.device("cpu")


def test_it_separates_what_a_line_separates():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 4
    # On a scale of its own in every feature; both views of an image have its label.
    embedded = torch.eye(4)[labels].repeat(2, 1) @ torch.randn(4, 8, generator=generator)
    embedded = 100 * embedded + 0.1 * torch.randn(128, 8, generator=generator) - 30
    probe = Probe(8, 4, CPU)
    for _ in range(300):
        probe.step(embedded.requires_grad_(), labels)
    predicted = probe.classifier.eval()(embedded).argmax(1)
    assert torch.equal(predicted, labels.repeat(2))
    assert embedded.grad is None


def test_building_it_draws_no_random_number():
    before = torch.get_rng_state()
    Probe(8, 4, CPU)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--ema_decay", 0.9),
        ("--queue_size", 256, "--method", "moco"),
        ("--precision", "bf16", "--num_views", 3),
    ],
    ids=lambda options: " ".join(map(str, options)) or "plain",
)
def test_its_accuracy_on_the_test_images_is_recorded(tmp_path, monkeypatch, capsys, options):
    monkeypatch.setattr("pretrain.draw", lambda *arguments: None)
    run = pretrain(tmp_path, "--epochs", 2, "--knn_every", 1, "--probe", "true", *options)
    saved = load_checkpoint(run / "last.pt")
    config = options_of(**saved["config"])
    data = load_data(config)
    network = build_model(config, channels=1)
    network.load_state_dict(saved["model"])
    network = network.to(memory_format=config.network.memory_format)
    probe = Probe(network.num_features, len(data.classes), CPU)
    probe.load_state_dict(saved["probe"])
    with torch.no_grad():
        embedded = encode_stored(network, build_views(config, data), data.test.images)
        predicted = probe.classifier.eval()(embedded).argmax(1)
    expected = (predicted == data.test.labels).double().mean().item()

    assert json.loads((run / "results.json").read_text())["probe_accuracy"] == expected > 0.11
    recorded = [row for row in metrics(run) if row["probe_accuracy"]]
    assert [row["epoch"] for row in recorded] == ["1", "2"]
    assert all(row["knn_accuracy"] for row in recorded)
    assert float(recorded[-1]["probe_accuracy"]) == pytest.approx(expected)
    assert f"  probe {expected:.2%}" in capsys.readouterr().out


def test_without_it_nothing_is_said_of_it(tmp_path, capsys):
    run = pretrain(tmp_path, "--max_steps", 1)
    assert not any(row["probe_accuracy"] for row in metrics(run))
    assert "probe_accuracy" not in json.loads((run / "results.json").read_text())
    assert "probe" not in capsys.readouterr().out
