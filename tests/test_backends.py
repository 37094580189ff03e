"""Every backend that runs here, on every case of the table, against the float64 truth."""

from __future__ import annotations

import functools

import pytest
import torch

from cases import BACKENDS, CASES, DTYPES, FUSED, NOWHERE, VARIANTS, Arguments, Case, by_id, takes
from compare import assert_close
from supcon_kernels import supcon_loss


def arguments_of(case: Case, variant: tuple[str, str]) -> Arguments:
    """A case's arguments with the options of a variant."""
    return {**case.arguments(), "summation": variant[0], "denominator": variant[1]}


VARIANT_CALLS = [
    pytest.param(backend, case, variant, id=f"{backend}-{case.id}-{'/'.join(variant)}")
    for backend in FUSED
    for case in CASES
    for variant in VARIANTS
    if takes(backend, arguments_of(case, variant))
]


def dtype_calls():
    """Each case in every dtype, with the default loss and one variant beside it."""
    for backend in BACKENDS:
        for k, case in enumerate(CASES):
            for variant in dict.fromkeys([("out", "all"), VARIANTS[k % len(VARIANTS)]]):
                if takes(backend, arguments_of(case, variant)):
                    for dtype in DTYPES:
                        name = f"{backend}-{case.id}-{'/'.join(variant)}-{dtype}"
                        yield pytest.param(backend, case, variant, dtype, id=name)


@pytest.mark.parametrize("backend, case, variant", VARIANT_CALLS)
def test_every_variant_in_float32(backend, case, variant):
    loss = functools.partial(supcon_loss, backend=backend)
    assert_close(loss, arguments_of(case, variant), torch.float32)


@pytest.mark.parametrize("backend, case, variant, dtype", list(dtype_calls()))
def test_every_dtype(backend, case, variant, dtype):
    loss = functools.partial(supcon_loss, backend=backend)
    assert_close(loss, arguments_of(case, variant), dtype)


@pytest.mark.parametrize("reduction", ["positive_mean", "sum", "none"])
@pytest.mark.parametrize(
    "name",
    ["singleton", "ignored_garbage", "two_views", "half_empty_memory", "symmetric_memory"],
)
@pytest.mark.parametrize("backend", FUSED)
def test_every_reduction(backend, name, reduction):
    for denominator in ("all", "only_negatives"):
        arguments = arguments_of(by_id(name), ("out", denominator))
        if reduction == "none" and "symmetric" in arguments:
            continue
        if takes(backend, arguments):
            loss = functools.partial(supcon_loss, backend=backend)
            assert_close(loss, {**arguments, "reduction": reduction}, torch.float32)


@pytest.mark.parametrize("wanted", ["features", "contrast_features", "temperature"])
@pytest.mark.parametrize(
    "backend, name, variant",
    [
        (backend, name, variant)
        for backend in FUSED
        for name in ("self_in_memory", "symmetric_memory", "symmetric_mask", "symmetric_soft")
        for variant in [("out", "all"), ("in", "one_positive")]
        if takes(backend, arguments_of(by_id(name), variant))
    ],
)
def test_a_gradient_wanted_alone_is_the_same(backend, name, variant, wanted):
    arguments = by_id(name).arguments()
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
