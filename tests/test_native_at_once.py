"""The compiled core on few pairs or few anchors: loss and gradients are made in one entry."""

import subprocess
import sys

import pytest
import torch

from cases import CASES, VARIANTS, takes
from supcon_kernels import supcon_loss
from supcon_kernels.backends import native
from test_native import WHY_NOT, arguments_of, native_loss, value_and_gradients

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


@pytest.mark.parametrize("reduction", ["mean", "positive_mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_gradients_made_in_the_forward_have_the_bits_of_the_backward(dtype, reduction, monkeypatch):
    results = []
    for limit in (native.MAX_PAIRS_AT_ONCE, 0):
        monkeypatch.setattr(native, "MAX_PAIRS_AT_ONCE", limit)
        monkeypatch.setattr(native, "MAX_ANCHORS_AT_ONCE", limit)
        for k, case in enumerate(CASES):
            arguments = arguments_of(case, VARIANTS[k % len(VARIANTS)])
            if takes("native", arguments) and arguments["features"].numel():
                widths = {x: v.to(dtype) for x, v in arguments.items() if x.endswith("features")}
                arguments = {**arguments, **widths, "reduction": reduction}
                got = value_and_gradients({**arguments, "base_temperature": None})
                results.append([x.nan_to_num() for x in got])
    half = len(results) // 2
    assert half
    for at_once, apart in zip(results[:half], results[half:]):
        assert all(torch.equal(a, b) for a, b in zip(at_once, apart))


def test_one_entry_into_the_core_makes_loss_and_gradient(monkeypatch):
    features, labels = torch.randn(8, 4, requires_grad=True), torch.arange(8) % 2
    monkeypatch.setattr(native, "backward", lambda *_: pytest.fail("a second entry"))
    loss = native_loss(features, labels)
    loss.backward(retain_graph=True)
    first = features.grad.clone()
    features.grad.zero_()  # what was made is given away, and made again
    (3 * loss).backward()
    assert torch.equal(features.grad, 3 * first)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()
    monkeypatch.setattr(native, "_empty_gradients", lambda *_: pytest.fail("not wanted"))
    with torch.no_grad():
        native_loss(features, labels)
    native_loss(features, labels, reduction="none")


def test_gradients_made_with_the_loss_are_scaled_by_many_gradients_of_it_at_once():
    features, labels = torch.randn(8, 4, requires_grad=True), torch.arange(8) % 2
    (expected,) = torch.autograd.grad(native_loss(features, labels), features)
    loss, factors = native_loss(features, labels), torch.tensor([1.0, 2.0])
    (both,) = torch.autograd.grad(loss, features, factors, is_grads_batched=True)
    torch.testing.assert_close(both, factors[:, None, None] * expected)


@pytest.mark.parametrize("backend", ["native", "tiled"])
def test_many_gradients_of_each_loss_at_once(backend):
    features, labels = torch.randn(8, 4, requires_grad=True), torch.arange(8) % 3

    def jacobian(backend):
        losses = supcon_loss(features, labels, reduction="none", backend=backend)
        return torch.autograd.grad(losses, features, torch.eye(8), is_grads_batched=True)[0]

    torch.testing.assert_close(jacobian(backend), jacobian("reference"))


def test_the_gradient_of_many_gradients_at_once_is_refused():
    features, labels = torch.randn(8, 4, requires_grad=True), torch.arange(8) % 2
    loss, factors = native_loss(features, labels), torch.tensor([1.0, 2.0])
    options = {"is_grads_batched": True, "create_graph": True}
    (both,) = torch.autograd.grad(loss, features, factors, **options)
    with pytest.raises(RuntimeError, match="can be differentiated twice only"):
        both.square().sum().backward()


def test_a_loss_that_is_skipped_leaves_no_gradient():
    class Skipped(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    features = torch.randn(8, 4, requires_grad=True)
    Skipped.apply(native_loss(features, torch.arange(8) % 2)).backward()
    assert features.grad is None


@pytest.mark.parametrize("of_contrasts", [False, True])
def test_few_anchors_are_prepared_with_their_contrasts_once(of_contrasts, monkeypatch):
    monkeypatch.setattr(native, "MAX_PAIRS_AT_ONCE", 0)
    entered, call_of = [], native._call
    monkeypatch.setattr(
        native, "_call", lambda problem: entered.append(problem) or call_of(problem)
    )
    features, contrasts = torch.randn(8, 4, requires_grad=True), torch.randn(16, 4)
    contrasts.requires_grad_(of_contrasts)  # a gradient as large as they are is not kept
    labels = {"labels": torch.arange(8) % 2, "contrast_labels": torch.arange(16) % 2}
    native_loss(features, contrast_features=contrasts, **labels).backward()
    assert len(entered) == 1 + of_contrasts


MANY_CONTRASTS = """
import re
from pathlib import Path

import torch
from supcon_kernels import supcon_loss

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def step(num_contrasts):
    anchors, contrasts = torch.ones(8, 64, requires_grad=True), torch.ones(num_contrasts, 64)
    labels = torch.zeros(8, dtype=torch.long), torch.zeros(num_contrasts, dtype=torch.long)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    loss = supcon_loss(
        anchors, labels[0], contrast_features=contrasts, contrast_labels=labels[1], backend="native"
    )
    loss.backward()
    return (peak() - before) / contrasts.nbytes

step(8)
print(step(200_000))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_few_anchors_hold_one_copy_of_their_contrasts():
    ran = subprocess.run(
        [sys.executable, "-c", MANY_CONTRASTS], capture_output=True, text=True, check=True
    )
    assert 1 < float(ran.stdout) < 1.8  # of which a quarter is padding of rows


def test_gradients_are_narrowed_after_they_are_scaled():
    features, labels = torch.randn(64, 16, dtype=torch.float16), torch.arange(64) % 8
    gradients = []
    for x in (features, features.float()):
        loss = native_loss(x.requires_grad_(), labels, temperature=1e5)
        gradients.append(torch.autograd.grad(loss * 2.0**16, x)[0])  # as GradScaler does
    narrow, wide = gradients
    assert wide.abs().max() < 2.0**-8  # without the factor float16 holds nothing of it
    assert torch.equal(narrow, wide.half())
