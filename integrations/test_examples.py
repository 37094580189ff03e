"""docs/examples: the programs in plain PyTorch and timm train, and what they promise holds."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from conftest import ROOT

# The share of its first value that a loss falls to. With labels it ends at about the logarithm of
# the number of positives.
FALLS_TO = {
    "pytorch_loop": 0.85,
    "timm_joint": 0.4,
    "clip_towers": 0.2,
    "cmc": 0.6,
    "cpc_infonce": 0.9,
    "multi_label": 0.97,
    "long_tail": 0.5,
}


@pytest.fixture(scope="module")
def runs() -> dict[str, dict]:
    """What each program left: they are run once for all tests of this file."""
    return {}


@pytest.fixture
def example(runs, run_example):
    """The names of a program that has run."""

    def get(name: str) -> dict:
        if name not in runs:
            runs[name] = run_example(name)
        return runs[name]

    return get


def neighbours_of_own_class(embeddings: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of rows whose nearest other row is of their class."""
    unit = F.normalize(embeddings, dim=1)
    nearest = (unit @ unit.T).fill_diagonal_(-1).argmax(1)
    return (labels[nearest] == labels).float().mean().item()


@pytest.mark.parametrize("name", FALLS_TO)
def test_the_loss_falls(example, name):
    losses = torch.tensor(example(name)["losses"])
    assert losses.isfinite().all()
    assert losses[-5:].mean() < FALLS_TO[name] * losses[:3].mean()


def test_the_plain_loop_brings_classes_together(example):
    found = example("pytorch_loop")
    assert neighbours_of_own_class(found["embeddings"], found["labels"]) > 0.97


def test_averaged_weights_classify(example):
    found = example("timm_joint")
    right = found["logits"].argmax(1) == found["labels"]
    assert right.float().mean() > 0.5
    pairs = zip(found["average"].module.parameters(), found["model"].parameters())
    assert any(not torch.equal(average, own) for average, own in pairs)


def test_clip_finds_the_caption_and_moves_the_temperature(example):
    found = example("clip_towers")
    with torch.no_grad():
        rows = [
            F.normalize(tower(inputs[:500]), dim=1)
            for tower, inputs in (
                (found["image_tower"], found["images"]),
                (found["text_tower"], found["captions"]),
            )
        ]
    assert ((rows[0] @ rows[1].T).argmax(1) == torch.arange(500)).float().mean() > 0.9
    assert found["log_scale"].item() != pytest.approx(torch.tensor(1 / 0.07).log().item())


def test_the_queue_fills_and_the_momentum_encoder_follows(example):
    found = example("moco_queue")
    losses = torch.tensor(found["losses"])
    full = len(found["queue"].labels) // 32
    assert losses[-10:].mean() < losses[full : full + 10].mean()
    assert (found["queue"].labels >= 0).all()
    average, own = (found[name][1].weight for name in ("momentum_encoder", "encoder"))
    assert not average.requires_grad and not torch.equal(average, own)
    with torch.no_grad():
        embeddings = found["momentum_encoder"](found["images"])
    assert neighbours_of_own_class(embeddings, found["labels"]) > 0.97


def test_half_images_of_a_sample_are_alike(example):
    found = example("cmc")
    labels = torch.tensor(load_digits().target)
    assert found["embeddings"].shape == (1797, 128)
    assert neighbours_of_own_class(found["embeddings"], labels) > 0.9


def test_images_that_share_labels_are_more_alike(example):
    found = example("multi_label")
    similarities = found["embeddings"] @ found["embeddings"].T
    labels = found["labels"].float()
    equal = F.normalize(labels, dim=1) @ F.normalize(labels, dim=1).T
    assert similarities[equal > 0.7].mean() > similarities[equal == 0].mean() + 0.3


def test_rare_classes_are_found(example):
    found = example("long_tail")
    counts = found["labels"].bincount()
    assert counts.tolist() == sorted(counts.tolist(), reverse=True) and counts[-1] <= 2
    right = (found["predicted"] == found["labels"]).float()
    recall = torch.stack([right[found["labels"] == c].mean() for c in range(10)])
    assert recall.mean() > 0.9 and recall[-3:].min() > 0.5


def test_two_ranks_with_shards_train_as_one_process(example, tmp_path, monkeypatch):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program = ROOT / "docs" / "examples" / "fsdp.py"
    # torch's caches of sharded tensors keep gloo's threads, whose end at exit aborts now and then.
    leaving = tmp_path / "leaving.py"
    leaving.write_text(f"import os, runpy\nrunpy.run_path({str(program)!r})\nos._exit(0)\n")
    subprocess.run([*torchrun, "--nproc-per-node=2", leaving], cwd=tmp_path, check=True)
    shards = torch.load(tmp_path / "encoder.pt", weights_only=True)

    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    found = example("fsdp")
    assert found["losses"][-1] < 0.95 * found["losses"][0]
    torch.testing.assert_close(shards["losses"], found["losses"], rtol=1e-5, atol=1e-5)
    for name, weights in found["weights"].items():
        torch.testing.assert_close(shards["model"][name], weights, rtol=1e-4, atol=1e-5)


def test_every_example_is_tested_and_shown():
    tested = "".join(path.read_text() for path in sorted((ROOT / "integrations").glob("test_*.py")))
    page = (ROOT / "docs" / "frameworks.md").read_text()
    for path in sorted((ROOT / "docs" / "examples").glob("*.py")):
        assert path.stem in tested
        assert f'--8<-- "{path.name}"' in page
