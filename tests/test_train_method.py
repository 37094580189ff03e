"""A method of one's own: parameters that the optimiser trains, state that checkpoints keep."""

import torch
import torch.nn.functional as F
from torch import nn

import train_fixtures  # noqa: F401  puts train/ on the path
from methods.method import Method
from train_fixtures import metrics, pretrain


class CrossEntropy(Method):
    """A classifier on the embeddings, which counts its steps."""

    uses_head = False

    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(32, 10)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, embedded, projected, targets):
        self.steps += 1
        return F.cross_entropy(self.classifier(embedded.float()), targets.repeat(2))


def test_it_trains_and_resumes_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr("training.build.build_method", lambda *arguments: CrossEntropy())
    monkeypatch.setattr("pretrain.draw", lambda *arguments: None)
    options = ("--batch_size", 256, "--epochs", 2, "--save_every", 4, "--keep", 9)
    options += ("--knn_bank", 100, "--ema_decay", 0.9)
    whole = pretrain(tmp_path / "whole", *options)
    other = pretrain(tmp_path / "other", *options)
    resumed = pretrain(tmp_path / "other", *options, "--resume", other / "step-4.pt")
    saved, expected, before = (
        torch.load(path, weights_only=True)
        for path in (resumed / "last.pt", whole / "last.pt", whole / "step-4.pt")
    )
    torch.testing.assert_close(saved["method"], expected["method"], rtol=0, atol=0)
    torch.testing.assert_close(saved["model"], expected["model"], rtol=0, atol=0)
    assert metrics(resumed) == metrics(whole)
    assert saved["method"]["steps"] == 10
    moved = saved["method"]["classifier.weight"] - before["method"]["classifier.weight"]
    assert moved.abs().max() > 1e-3
    # Nothing of the loss depends on the head, which stays as it is.
    assert torch.equal(saved["model"]["head.0.weight"], before["model"]["head.0.weight"])
