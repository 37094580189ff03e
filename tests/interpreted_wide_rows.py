"""The Triton kernels of wide rows by Triton's interpreter; tests/interpreted_triton.py has the others."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from cases import VARIANTS
from compare import reference
from supcon_kernels import supcon_loss, triton_call, triton_launch, triton_run, triton_shares
from supcon_kernels.triton_tiles import Target

# The interpreter computes masked lanes too, of which some overflow.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
triton_loss = functools.partial(supcon_loss, backend="triton")


@pytest.mark.parametrize(
    "labels, variant", [("hard", VARIANTS[0]), ("soft", VARIANTS[0]), ("hard", VARIANTS[4])]
)
@pytest.mark.parametrize("has_memory", [False, True])
def test_wide_rows(has_memory, labels, variant, monkeypatch):
    monkeypatch.setattr(triton_call, "workspace_bytes", 4 * 128**2)  # a part of rows and columns
    monkeypatch.setattr("supcon_kernels.kernels.backward.GROUP", 3)  # of four blocks of rows
    g = torch.Generator().manual_seed(0)
    leaves = {"features": torch.randn(140, 130, generator=g)}
    options = {"labels": torch.arange(140) % 7, "temperature": torch.tensor(0.1)}
    if has_memory:
        leaves["contrast_features"] = torch.randn(150, 130, generator=g)
        options["contrast_labels"] = torch.arange(150) % 9
    if labels == "soft":
        options |= {k: F.one_hot(x, 9).float() for k, x in options.items() if k.endswith("labels")}
    options |= {"summation": variant[0], "denominator": variant[1]}

    def gradients(loss_function, dtype):
        inputs = {k: v.to(dtype).requires_grad_() for k, v in leaves.items()}
        tau = options["temperature"].clone().requires_grad_()
        loss = loss_function(**inputs, **{**options, "temperature": tau})
        return torch.autograd.grad(loss, [*inputs.values(), tau])

    for ours, want in zip(
        gradients(triton_loss, torch.float32), gradients(reference, torch.float64)
    ):
        torch.testing.assert_close(ours.double(), want.double(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tau, labels, variant", [
    (0.1, "hard", ("out", "all")),
    (0.1, "hard", ("in", "only_negatives")),
    (0.01, "hard", ("in", "all")),
    (0.01, "sorted", ("out", "only_negatives")),
    (0.1, "soft", ("out", "all")),
    (0.01, "ignored", ("out", "all")),
])  # fmt: skip
def test_both_directions_of_one_set_of_scores(tau, labels, variant, monkeypatch):
    # Three programs own blocks of rows of which some are whole.
    monkeypatch.setattr(triton_call, "_target", lambda device: Target(0, 3))
    monkeypatch.setattr(triton_shares, "MIN_SHARE", 1)
    monkeypatch.setattr(triton_call, "_temperature", lambda problem: problem.temperature_tensor)
    if labels == "sorted":
        monkeypatch.setattr(triton_launch, "SORTED_PAIRS", 0)
    forwards = []
    run = triton_run.run

    def recorded(launch, device, given):
        forwards.append(launch) if launch.kernel == "_forward_kernel" else None
        run(launch, device, given)

    monkeypatch.setattr(triton_run, "run", recorded)
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(n, 130, generator=g) for n in (260, 130)]
    of_rows, of_cols = torch.arange(260) % 9, torch.arange(130) % 7  # two classes without a column
    if labels == "ignored":
        of_rows[40:170], of_cols[3:100:2] = -100, -100
    if labels == "soft":
        of_rows, of_cols = F.one_hot(of_rows, 9).float(), F.one_hot(of_cols, 9).float()
    options = {"labels": of_rows, "contrast_labels": of_cols, "symmetric": True}
    options |= {"summation": variant[0], "denominator": variant[1]}

    def gradients(loss_function, dtype):
        rows, cols = (x.to(dtype).requires_grad_() for x in leaves)
        temperature = torch.tensor(tau).requires_grad_()
        inputs = {"features": rows, "contrast_features": cols, "temperature": temperature}
        loss = loss_function(**inputs, **options)
        return [loss, *torch.autograd.grad(loss, (rows, cols, temperature))]

    for ours, want in zip(
        gradients(triton_loss, torch.float32), gradients(reference, torch.float64)
    ):
        close = {"rtol": 2e-5, "atol": 2e-5 * want.abs().max().item()}
        torch.testing.assert_close(ours.double(), want.double(), **close)
    # One without maxima and one with, of which the device chooses.
    assert [launch.constexprs["BOTH"] for launch in forwards] == [True, True]
