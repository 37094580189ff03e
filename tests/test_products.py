"""Products of 16-bit features, as a CUDA device makes them: here the same numbers on the CPU."""

from __future__ import annotations

import functools
import types

import pytest
import torch

from cases import by_id
from compare import assert_close
from supcon_kernels import distributed, op, products, supcon_loss
from supcon_kernels.backends import tiled
from supcon_kernels.backends.protocol import Anchors, Wanted
from supcon_kernels.problem import Problem

tiled_loss = functools.partial(supcon_loss, backend="tiled")
SHORT = [torch.float16, torch.bfloat16]


@pytest.fixture
def multiplied(monkeypatch):
    """The dtypes of the operands of each product that a device with units for 16 bits makes."""
    found = []

    def accumulated(a, b):
        found.extend((a.dtype, b.dtype))
        return a.float() @ b.float()

    monkeypatch.setattr(products, "accumulated", accumulated)
    monkeypatch.setattr(tiled, "short_dtype", lambda x: x.dtype if x.dtype in SHORT else None)
    return found


@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize(
    "name, variant",
    [
        ("two_views", ("out", "all")),
        ("half_empty_memory", ("out", "all")),
        ("symmetric_tiles", ("out", "all")),
        ("unnormalised", ("in", "only_negatives")),
        ("weighted_mask", ("out", "one_positive")),
        ("symmetric_mask", ("in", "all")),
        ("soft_self_in_memory", ("out", "all")),
    ],
)
def test_features_are_multiplied_in_16_bits(name, variant, dtype, multiplied):
    options = dict(zip(("summation", "denominator"), variant))
    assert_close(tiled_loss, {**by_id(name).arguments(), **options}, dtype)
    assert multiplied and set(multiplied) == {dtype}


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_among_the_rows_of_other_ranks_they_are_too(dtype, multiplied):
    g = torch.Generator().manual_seed(0)
    features, labels = torch.randn(40, 8, generator=g).to(dtype), torch.arange(40) % 5

    def problem_of(rows, of_rows):
        options = (0.1, 0, "out", "all", True, -100)
        return Problem(rows, None, of_rows, None, None, None, *options)

    whole = problem_of(features, labels)
    found = op.results_of(whole, "tiled", "sum")
    of_whole = Anchors(torch.ones(()), torch.ones(()), found.stats)
    expected = op.gradients_of(whole, of_whole, None, Wanted(rows=True), "tiled").rows
    multiplied.clear()
    saved = found.stats[:, :24], found.stats[:, 24:], found.prepared
    gathered = features, labels, features[:0], labels[:0]
    own = problem_of(features[:24], labels[:24])
    wanted = Wanted(rows=True, unrounded=True)
    grads = distributed.gradients(own, gathered, torch.ones(()), saved, wanted, "tiled")
    torch.testing.assert_close(grads.rows, expected[:24].float(), rtol=2**-7, atol=1e-4)
    assert multiplied and set(multiplied) == {dtype}


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_what_is_left_of_terms_that_cancel_is_kept(dtype):
    # A softmax of nearly 1 over many rows, and what its anchors weigh in a mean.
    g = torch.Generator().manual_seed(0)
    a = torch.rand(40, 60, generator=g).pow(8) / 2**22
    b = torch.randn(60, 8, generator=g).to(dtype).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "accumulated", lambda a, b: a.float() @ b.float())
        found = products.product_in_parts(a, b, dtype).double()
    exact = a.double() @ b.double()
    bits = 20 if dtype == torch.float16 else 15
    assert (found - exact).abs().max() < 2.0**-bits * exact.abs().max()


def test_which_devices_multiply_in_16_bits(monkeypatch):
    capability = [(7, 5)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    monkeypatch.setattr(products, "_HAS_OUT_DTYPE", True)

    def chosen(dtype, is_cuda=True):
        return products.short_dtype(
            types.SimpleNamespace(dtype=dtype, is_cuda=is_cuda, device="cuda")
        )

    assert chosen(torch.float16) == torch.float16
    assert chosen(torch.bfloat16) is None  # before sm_80 it is not faster
    capability[0] = (8, 0)
    assert chosen(torch.bfloat16) == torch.bfloat16
    assert chosen(torch.float32) is None
    assert chosen(torch.bfloat16, is_cuda=False) is None
    monkeypatch.setattr(products, "_HAS_OUT_DTYPE", False)
    assert chosen(torch.float16) is None
