"""Every backend that runs here, on every case of the table, against the float64 truth."""

from __future__ import annotations

import functools

import pytest
import torch

from cases import CASES, DTYPES, NOWHERE, VARIANTS, by_id, parametrize
from compare import assert_close
from supcon_kernels import available_backends, supcon_loss

BACKENDS = [name for name, why_not in available_backends().items() if why_not is None]
FUSED = [name for name in BACKENDS if name != "reference"]


@pytest.mark.parametrize("variant", VARIANTS, ids="/".join)
@parametrize()
@pytest.mark.parametrize("backend", FUSED)
def test_every_variant_in_float32(backend, case, variant):
    summation, denominator = variant
    arguments = {**case.arguments(), "summation": summation, "denominator": denominator}
    assert_close(functools.partial(supcon_loss, backend=backend), arguments, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@parametrize()
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_dtype(backend, case, dtype):
    # Each case meets one variant beside the default, so that all of them meet every dtype.
    variant = VARIANTS[CASES.index(case) % len(VARIANTS)]
    for summation, denominator in {("out", "all"), variant}:
        arguments = {**case.arguments(), "summation": summation, "denominator": denominator}
        assert_close(functools.partial(supcon_loss, backend=backend), arguments, dtype)


@pytest.mark.parametrize("reduction", ["positive_mean", "sum", "none"])
@pytest.mark.parametrize("name", ["singleton", "ignored_garbage", "two_views", "half_empty_memory"])
@pytest.mark.parametrize("backend", FUSED)
def test_every_reduction(backend, name, reduction):
    arguments = {**by_id(name).arguments(), "reduction": reduction, "denominator": "only_negatives"}
    assert_close(functools.partial(supcon_loss, backend=backend), arguments, torch.float32)


@pytest.mark.parametrize("wanted", ["features", "contrast_features", "temperature"])
@pytest.mark.parametrize("variant", [("out", "all"), ("in", "one_positive")], ids="/".join)
@pytest.mark.parametrize("backend", FUSED)
def test_a_gradient_wanted_alone_is_the_same(backend, variant, wanted):
    arguments = by_id("self_in_memory").arguments()
    arguments["temperature"] = torch.tensor(0.1, dtype=torch.float64)
    options = {"summation": variant[0], "denominator": variant[1], "backend": backend}
    leaves = ("features", "contrast_features", "temperature")

    def gradients(*names):
        tensors = {n: arguments[n].clone().requires_grad_(n in names) for n in leaves}
        supcon_loss(**{**arguments, **tensors, **options}).backward()
        return {n: t.grad for n, t in tensors.items()}

    alone, together = gradients(wanted), gradients(*leaves)
    assert [n for n in leaves if alone[n] is not None] == [wanted]
    torch.testing.assert_close(alone[wanted], together[wanted], rtol=0, atol=0)


# --- the comparison itself: it must refuse what is wrong


def drop_a_column(features, labels, **options):
    """The last row is nobody's contrast."""
    seen = labels.clone()
    seen[-1] = NOWHERE
    return supcon_loss(
        features,
        labels,
        contrast_features=features,
        contrast_labels=seen,
        self_offset=0,
        **options,
    )


def keep_the_self_pair(features, labels, **options):
    """An anchor is its own positive."""
    return supcon_loss(
        features, labels, contrast_features=features, contrast_labels=labels, **options
    )


def miss_the_merged_term(features, labels, **options):
    """A row's gradient as an anchor without its gradient as a contrast."""
    return supcon_loss(
        features,
        labels,
        contrast_features=features.detach(),
        contrast_labels=labels,
        self_offset=0,
        **options,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mutant", [drop_a_column, keep_the_self_pair, miss_the_merged_term])
def test_the_comparison_refuses_a_mutant(mutant, dtype):
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close(mutant, by_id("ragged").arguments(), dtype)
