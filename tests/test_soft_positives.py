"""Sums over soft classes, against the weight of each pair."""

from __future__ import annotations

import pytest
import torch

from supcon_kernels import soft_positives
from supcon_kernels.soft_positives import weighted_sums


def sums_by_pair(of_rows, of_cols, vectors, offset):
    weights = of_rows @ of_cols.T
    if offset is not None:
        i, j = torch.meshgrid(*map(torch.arange, weights.shape), indexing="ij")
        weights[j == i + offset] = 0
    return weights @ vectors


@pytest.mark.parametrize("shape", [(23, 23), (9, 30), (30, 9), (0, 5), (5, 0)], ids=str)
def test_each_row_takes_all_columns_but_itself(shape, monkeypatch):
    monkeypatch.setattr(soft_positives, "MIN_BLOCK", 4)  # several blocks, the last one short
    g = torch.Generator().manual_seed(0)
    num_rows, num_cols = shape
    of_rows, of_cols = torch.rand(num_rows, 3, generator=g), torch.rand(num_cols, 3, generator=g)
    inputs = [of_rows.double(), of_cols.double(), torch.randn(num_cols, 6, generator=g).double()]
    for offset in (None, 0, 5, -7, 100):
        found = weighted_sums(*inputs, offset)
        torch.testing.assert_close(found, sums_by_pair(*inputs, offset))


def test_what_a_row_weighs_with_itself_costs_no_digits():
    # Alone in its class, a row has 1e-30 of its own weight in common with the others.
    labels = torch.eye(200, dtype=torch.float64) + 1e-30
    vectors = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)).double()
    want = sums_by_pair(labels, labels, vectors, 0)
    torch.testing.assert_close(weighted_sums(labels, labels, vectors, 0), want, rtol=1e-12, atol=0)
