"""The Triton kernels of wide rows by Triton's interpreter; tests/interpreted_triton.py has the others."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from cases import VARIANTS
from compare import reference
from in_parts import loss_in_parts
from supcon_kernels import (
    supcon_loss,
    triton_call,
    triton_launch,
    triton_run,
    triton_shares,
    triton_tiles,
)
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


@pytest.fixture
def work(monkeypatch):
    """The forward's launches, those of both directions with the slots of their columns' sums, and the
    multiplications of each product of the whole call.

    Three programs own blocks of rows and parts of them.
    """
    found = SimpleNamespace(forwards=[], both=[], products=[])
    run, product = triton_run.run, triton_call._product

    def recorded_run(launch, device, given):
        if launch.kernel in ("_forward_kernel", "_derivatives_kernel"):
            num_tiles = launch.grid[0]
            if launch.kernel == "_forward_kernel":
                found.forwards.append(launch)
                num_tiles = given["num_blocks"] * given["num_tiles"]
                if launch.constexprs["BOTH"]:
                    found.both.append((launch, len(given["col_sums_ptr"])))
            pairs = num_tiles * launch.constexprs["ROWS"] * launch.constexprs["COLS"]
            found.products.append(pairs * given["padded_dim"])
        run(launch, device, given)

    def recorded_product(a, b):
        found.products.append(a.numel() * b.shape[1])
        return product(a, b)

    monkeypatch.setattr(triton_run, "run", recorded_run)
    monkeypatch.setattr(triton_call, "_product", recorded_product)
    monkeypatch.setattr(triton_call, "_target", lambda device: Target(0, 3))
    monkeypatch.setattr(triton_shares, "MIN_SHARE", 1)
    return found


def gradients_of(loss_function, dtype, leaves, tau, **options):
    """The loss of both directions, and the gradients of rows, columns and temperature."""
    rows, cols = (x.to(dtype).requires_grad_() for x in leaves)
    temperature = torch.tensor(tau, requires_grad=True)
    inputs = {"features": rows, "contrast_features": cols, "temperature": temperature}
    loss = loss_function(**inputs, **options, symmetric=True)
    return [loss.detach(), *torch.autograd.grad(loss, (rows, cols, temperature))]


def assert_exact(ours, exact):
    for found, want in zip(ours, exact):
        close = {"rtol": 2e-5, "atol": 2e-5 * want.abs().max().item()}
        torch.testing.assert_close(found.double(), want.double(), **close)


@pytest.mark.parametrize("tau, labels, variant", [
    (0.1, "hard", ("out", "all")),
    (0.1, "hard", ("in", "only_negatives")),
    (0.01, "hard", ("in", "all")),
    (0.01, "sorted", ("out", "only_negatives")),
    (0.1, "soft", ("out", "all")),
    (0.01, "ignored", ("out", "all")),
    (0.1, "hard", ("out", "one_positive")),
    (0.1, "ignored", ("in", "one_positive")),
    (0.01, "ignored", ("out", "one_positive")),
    (0.01, "hard", ("in", "one_positive")),
])  # fmt: skip
def test_both_directions_of_one_set_of_scores(tau, labels, variant, work, monkeypatch):
    monkeypatch.setattr(triton_call, "_temperature", lambda problem: problem.temperature_tensor)
    if labels == "sorted":
        monkeypatch.setattr(triton_launch, "SORTED_PAIRS", 0)
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(n, 130, generator=g) for n in (120, 70)]
    of_rows, of_cols = torch.arange(120) % 9, torch.arange(70) % 7  # two classes without a column
    if labels == "ignored":
        of_rows[20:90], of_cols[3:60:2] = -100, -100
    if labels == "soft":
        of_rows, of_cols = F.one_hot(of_rows, 9).float(), F.one_hot(of_cols, 9).float()
    options = {"labels": of_rows, "contrast_labels": of_cols}
    options |= {"summation": variant[0], "denominator": variant[1]}
    exact = gradients_of(reference, torch.float64, leaves, tau, **options)
    assert_exact(gradients_of(triton_loss, torch.float32, leaves, tau, **options), exact)
    # One without maxima and one with, of which the device chooses; and the same for a second look.
    num_looks = 2 if variant[1] == "one_positive" else 1
    assert [launch.constexprs["BOTH"] for launch in work.forwards] == [True, True] * num_looks


def test_a_column_may_be_far_from_every_row(work):
    g = torch.Generator().manual_seed(0)
    direction = torch.randn(130, generator=g)
    rows = direction + 0.1 * torch.randn(140, 130, generator=g)
    cols = torch.cat([rows[:20] + 0.1 * torch.randn(20, 130, generator=g), -rows[20:24]])
    options = {"labels": torch.arange(140) % 4, "contrast_labels": torch.arange(24) % 4}
    exact = gradients_of(reference, torch.float64, (rows, cols), 0.01, **options)
    ours = gradients_of(triton_loss, torch.float32, (rows, cols), 0.01, **options)
    # In float32 little is left of the temperature's gradient, whose terms nearly cancel.
    assert_exact(ours[:3], exact[:3])
    assert [launch.constexprs["BOTH"] for launch in work.forwards] == [True]


@pytest.mark.parametrize("tau", [0.1, 0.01])
def test_programs_of_one_block_of_rows_share_the_sums_of_columns(tau, work, monkeypatch):
    monkeypatch.setattr(triton_call, "_target", lambda device: Target(0, 7))
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(n, 130, generator=g) for n in (100, 300)]
    options = {"labels": torch.arange(100) % 9, "contrast_labels": torch.arange(300) % 11}
    exact = gradients_of(reference, torch.float64, leaves, tau, **options)
    assert_exact(gradients_of(triton_loss, torch.float32, leaves, tau, **options), exact)
    ((launch, slots),) = work.both
    assert slots == 128 // launch.constexprs["ROWS"] < launch.grid[0] == 7


def test_both_directions_take_four_products(work, monkeypatch):
    monkeypatch.setattr(triton_call, "workspace_bytes", 4 * 128**2)  # six blocks of H
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(n, 130, generator=g) for n in (260, 130)]
    options = {"labels": torch.arange(260) % 9, "contrast_labels": torch.arange(130) % 7}
    exact = gradients_of(reference, torch.float64, leaves, 0.1, **options)
    assert_exact(gradients_of(triton_loss, torch.float32, leaves, 0.1, **options), exact)
    padded = [triton_tiles.padded_rows(len(leaf)) for leaf in leaves]
    one_product = padded[0] * padded[1] * triton_tiles.padded_dim(130)
    # The scores of the forward, those of each block of H, and its product with either side.
    assert len(work.products) == 1 + 6 * 3
    assert sum(work.products) == 4 * one_product


@pytest.mark.parametrize("tau, labels, variant, dim", [
    (0.1, "soft", ("out", "all"), 130),
    (0.01, "ignored", ("in", "only_negatives"), 130),
    (0.1, "ignored", ("out", "only_negatives"), 20),
    (0.1, "ignored", ("in", "one_positive"), 130),
    (0.01, "hard", ("out", "one_positive"), 20),
])  # fmt: skip
def test_parts_of_the_rows_have_parts_of_the_columns_sums(tau, labels, variant, dim, work):
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(n, dim, generator=g) for n in (105, 100)]
    of_rows, of_cols = torch.arange(105) % 9, torch.arange(100) % 7
    of_rows[:70][of_rows[:70] == 3] = 4  # no row of the first part is of this class
    if labels == "ignored":
        of_rows[20:85], of_cols[3:80:2] = -100, -100
    if labels == "soft":
        of_rows, of_cols = F.one_hot(of_rows, 9).float(), F.one_hot(of_cols, 9).float()
    options = {"labels": of_rows, "contrast_labels": of_cols, "reduction": "sum"}
    options |= {"summation": variant[0], "denominator": variant[1]}
    exact = gradients_of(reference, torch.float64, leaves, tau, **options)
    in_parts = functools.partial(loss_in_parts, backend="triton")
    assert_exact(gradients_of(in_parts, torch.float32, leaves, tau, **options), exact)
    # At negatives, again at these and at positives; one way at a time, the columns' are known then.
    num_looks, num_apart = (3, 5) if variant[1] == "one_positive" else (1, 2)
    is_wide = dim == 130
    assert [x.constexprs["BOTH"] for x in work.forwards] == [is_wide] * 3 * (
        num_looks if is_wide else num_apart
    )
