"""What some of the rows tell of the columns of a symmetric call adds up to what all of them tell."""

from __future__ import annotations

import functools

import pytest
import torch

from cases import BACKENDS, VARIANTS, by_id
from compare import assert_close
from in_parts import loss_in_parts, negatives_of, parts_of, problem_of
from supcon_kernels import partial_sums
from supcon_kernels.backends import FUSED

NAMES = ("towers", "cold_towers", "wide", "memory", "tiles", "soft")
backends = pytest.mark.parametrize("backend", [b for b in ("native", "tiled") if b in BACKENDS])
variants = pytest.mark.parametrize("variant", VARIANTS)


@backends
@variants
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_parts_add_up_to_the_whole(name, dtype, variant, backend):
    options = dict(zip(("summation", "denominator"), variant)) | {"reduction": "sum"}
    arguments = {**by_id(f"symmetric_{name}").arguments(), **options}
    assert_close(functools.partial(loss_in_parts, backend=backend), arguments, dtype)


@backends
@variants
def test_a_part_without_a_negative_or_without_a_positive(variant, backend):
    g = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 6 + [1] * 3)  # the parts are six rows and three
    options = dict(zip(("summation", "denominator"), variant)) | {"reduction": "sum"}
    arguments = {
        "features": torch.randn(9, 4, generator=g, dtype=torch.float64),
        "contrast_features": torch.randn(5, 4, generator=g, dtype=torch.float64),
        "labels": labels,
        "contrast_labels": torch.tensor([0, 1, 2, 0, -100]),  # no row is of class 2
        "symmetric": True,
        "temperature": 0.2,
        **options,
    }
    assert_close(functools.partial(loss_in_parts, backend=backend), arguments, torch.float64)


@backends
@variants
def test_a_row_that_is_not_finite_reaches_all_columns_that_take_part(variant, backend):
    arguments = by_id("symmetric_memory").arguments()
    arguments["features"][(arguments["labels"] != -100).nonzero()[-1]] = torch.nan
    options = dict(zip(("summation", "denominator"), variant))
    problem = problem_of(backend, **arguments, **options)
    _, mirrored = problem.ways()
    parts = parts_of(problem)
    negatives = negatives_of(parts, backend)
    assert negatives is None or torch.equal(negatives.isnan(), ~mirrored.row_ignored())
    sums = [FUSED[backend].forward_of_some(part, negatives)[1] for part in parts]
    assert negatives is not None or not sums[0].isnan().any()
    losses = partial_sums.losses(mirrored, partial_sums.merged(mirrored, sums))
    torch.testing.assert_close(losses.isnan(), ~mirrored.row_ignored())
