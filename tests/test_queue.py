"""The memory of past embeddings."""

from __future__ import annotations

import numpy as np
import torch

from supcon_kernels import LabelQueue, supcon_loss


def test_oldest_entries_leave_first():
    queue = LabelQueue(np.int64(4), 2)
    assert repr(queue) == "LabelQueue(size=4, dim=2)"
    assert queue.labels.tolist() == [-100] * 4
    queue.enqueue(torch.tensor([[1.0, 1.0], [2.0, 2.0]]), torch.tensor([1, 2]))
    assert queue.labels.tolist() == [-100, -100, 1, 2]
    queue.enqueue(torch.arange(3.0, 6.0)[:, None].expand(3, 2), torch.tensor([3, 4, 5]))
    assert queue.labels.tolist() == [2, 3, 4, 5]
    assert queue.features[:, 0].tolist() == [2.0, 3.0, 4.0, 5.0]
    queue.enqueue(torch.arange(6.0, 12.0)[:, None].expand(6, 2), torch.arange(6, 12))
    assert queue.labels.tolist() == [8, 9, 10, 11]


def test_empty_slots_are_as_if_absent():
    torch.manual_seed(0)
    features, labels = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 2, 2])
    keys, names = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    queue = LabelQueue(16, 3)
    queue.enqueue(keys, names)
    loss = supcon_loss(
        features, labels, contrast_features=queue.features, contrast_labels=queue.labels
    )
    expected = supcon_loss(features, labels, contrast_features=keys, contrast_labels=names)
    torch.testing.assert_close(loss, expected)


def test_enqueueing_between_forward_and_backward():
    features, labels = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 2, 2])
    queue = LabelQueue(8, 3)
    queue.enqueue(features.flip(0), labels.flip(0))

    def gradient(then):
        x = features.clone().requires_grad_()
        loss = supcon_loss(
            x, labels, contrast_features=queue.features, contrast_labels=queue.labels
        )
        then(x)
        return torch.autograd.grad(loss, x)[0]

    expected = gradient(lambda x: None)
    assert torch.equal(gradient(lambda x: queue.enqueue(x, labels)), expected)
    assert not queue.features.requires_grad


def test_a_queue_filled_under_inference_mode_is_trained_against():
    with torch.inference_mode():
        empty, filled = LabelQueue(8, 3), LabelQueue(8, 3)
        filled.enqueue(torch.randn(6, 3), torch.arange(6) % 3)
    x, labels = torch.randn(6, 3, requires_grad=True), torch.arange(6) % 3
    for queue in (empty, filled):
        contrast = {"contrast_features": queue.features, "contrast_labels": queue.labels}
        for backend in ("tiled", "reference"):
            supcon_loss(x, labels, **contrast, backend=backend).backward()
    assert x.grad.isfinite().all()


def test_state_dict_round_trip():
    queue, other = LabelQueue(3, 2, dtype=torch.float64), LabelQueue(3, 2, dtype=torch.float64)
    queue.enqueue(torch.randn(2, 2), torch.tensor([4, 5]))
    assert queue.features.dtype == torch.float64
    other.load_state_dict(queue.state_dict())
    assert torch.equal(other.features, queue.features)
    assert torch.equal(other.labels, queue.labels)
