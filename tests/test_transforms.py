"""The loss under torch.export and torch.func.vmap."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export.experimental import _export_forward_backward

from supcon_kernels import SupConLoss, supcon_loss


class Step(nn.Module):
    """What a training step differentiates."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 4)
        self.loss = SupConLoss(group="local")

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.loss(self.encoder(x).unflatten(0, (-1, 2)), labels)


@pytest.mark.parametrize("labels", [torch.arange(6) // 2, torch.rand(6, 5)], ids=["hard", "soft"])
def test_an_exported_step_has_the_operator_forward_and_backward(labels):
    step, x = Step(), torch.randn(12, 8)
    joint = _export_forward_backward(torch.export.export(step, (x, labels)))
    called = [str(node.target) for node in joint.graph.nodes if node.op == "call_function"]
    ours = [name for name in called if name.startswith("supcon_kernels")]
    assert ours == ["supcon_kernels.forward.default", "supcon_kernels.backward.default"]
    loss, *grads = joint.graph_module(*step.parameters(), x, labels)
    expected = step(x, labels)
    torch.testing.assert_close(loss, expected)
    want = torch.autograd.grad(expected, list(step.parameters()))
    for ours, theirs in zip(grads, want, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")  # torch.func's own doing
@pytest.mark.parametrize("kind", ["hard", "soft", "mask"])
def test_vmap_over_batches_and_temperatures(kind):
    features, tau = torch.randn(3, 6, 4, dtype=torch.float64), torch.tensor([0.1, 0.5, 1.0])
    soft, hard = torch.rand(3, 6, 5), torch.randint(3, (3, 6))
    targets = {"hard": hard, "soft": soft, "mask": torch.randn(3, 6, 6)}[kind]

    def loss(x, target, tau):
        given = {"mask" if kind == "mask" else "labels": target}
        return supcon_loss(x, **given, temperature=tau)

    def one_by_one(function):
        return torch.stack([function(*call) for call in zip(features, targets, tau)])

    found = torch.func.vmap(loss)(features, targets, tau)
    torch.testing.assert_close(found, one_by_one(loss))
    grad = torch.func.grad(loss)
    found = torch.func.vmap(grad)(features, targets, tau)
    torch.testing.assert_close(found, one_by_one(grad))
