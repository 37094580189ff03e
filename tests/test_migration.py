"""The replacements that docs/migration.md promises, against the library that they replace."""

from __future__ import annotations

import pytest
import torch
from pytorch_metric_learning import losses

from cases import by_id
from supcon_kernels import LabelQueue, supcon_loss


def value_and_gradient(function, features):
    leaf = features.clone().requires_grad_()
    loss = function(leaf)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def assert_same(ours, theirs, features):
    for got, expected in zip(
        value_and_gradient(ours, features), value_and_gradient(theirs, features)
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["aligned", "singleton", "several_tiles"])
def test_supcon_of_pytorch_metric_learning(name):
    arguments = by_id(name).arguments()
    features, labels = arguments["features"], arguments["labels"]
    assert_same(
        lambda x: supcon_loss(x, labels, temperature=0.1, reduction="positive_mean"),
        lambda x: losses.SupConLoss(temperature=0.1)(x, labels),
        features,
    )


def test_references_of_pytorch_metric_learning():
    arguments = by_id("memory").arguments()
    features, labels = arguments["features"], arguments["labels"]
    memory, names = arguments["contrast_features"], arguments["contrast_labels"]
    assert_same(
        lambda x: supcon_loss(
            x,
            labels,
            contrast_features=memory,
            contrast_labels=names,
            temperature=0.1,
            reduction="positive_mean",
        ),
        lambda x: losses.SupConLoss(temperature=0.1)(x, labels, ref_emb=memory, ref_labels=names),
        features,
    )


def test_nt_xent():
    z0, z1 = by_id("unlabelled_views").arguments()["features"][:, :2].unbind(1)
    samples = torch.arange(len(z0))
    assert_same(
        lambda x: supcon_loss(torch.stack((x, z1), 1), temperature=0.5),
        lambda x: losses.NTXentLoss(0.5)(torch.cat((x, z1)), samples.repeat(2)),
        z0,
    )


def test_cross_batch_memory():
    arguments = by_id("several_tiles").arguments()
    batches = list(zip(arguments["features"].split(60), arguments["labels"].split(60)))[:5]
    theirs = losses.CrossBatchMemory(losses.SupConLoss(temperature=0.1), 24, memory_size=150)
    queue = LabelQueue(150, 24, dtype=torch.float64)

    def ours(x, labels):
        queue.enqueue(x, labels)
        return supcon_loss(
            x,
            labels,
            contrast_features=queue.features,
            contrast_labels=queue.labels,
            self_offset=len(queue.labels) - len(labels),
            temperature=0.1,
            reduction="positive_mean",
        )

    for features, labels in batches:  # the memory is not full, then is, then drops rows
        assert_same(lambda x, y=labels: ours(x, y), lambda x, y=labels: theirs(x, y), features)
