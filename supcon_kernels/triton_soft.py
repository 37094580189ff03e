"""What soft labels add to the Triton kernels: the positives' part of the loss and of the gradient.

The pair kernels are given no labels. They make the sums of all powers, and the softmax part of the
gradient. The rest is put where they would have left it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from supcon_kernels.triton_launch import FITTING_TEMPERATURES, Plan

# Rows of the statistics: the total weight of an anchor's positives is the first times 2 to the second.
_TOTAL, _EXPONENT = 1, 4
# Row of the sums where those of positives are, and of the weights where their pull is.
_POSITIVES, _PULL = 2, 2


def put_means(sums: Tensor, num_positives: Tensor, mean: Tensor, total: Tensor) -> None:
    """Let each anchor have one positive, of the mean exponent of its positives.

    Args:
        sums: (pieces, 4, padded rows) of the forward kernel.
        num_positives: (padded rows,) for the loss kernel.
        mean, total: (N,) mean exponent of each anchor's positives, and what they weigh.
    """
    sums[:, _POSITIVES:].zero_()  # nothing is shifted
    sums[0, _POSITIVES, : len(mean)] = mean
    num_positives[: len(mean)] = total != 0


def keep_totals(stats: Tensor, total: Tensor) -> None:
    """Put the positives' total weight, which may be beyond float32, among the statistics (5, N)."""
    mantissa, exponent = torch.frexp(total)
    stats[_TOTAL] = torch.where(total == 0, torch.inf, mantissa)
    stats[_EXPONENT] = exponent


def taken_pull(weights: Tensor, stats: Tensor) -> Tensor:
    """(n,) float64: what each anchor's positives weigh, which is taken out of the weights (4, padded n)."""
    pull = weights[_PULL, : stats.shape[1]].double() * torch.exp2(-stats[_EXPONENT].double())
    weights[_PULL].zero_()
    return pull


def exponent_scale(plan: Plan, temperature: Tensor | float) -> Tensor | float:
    """What products of prepared rows are multiplied by to be exponents of 2."""
    if plan.running == (False,):
        return 1.0
    if not isinstance(temperature, Tensor):
        return 1.0 / (temperature * math.log(2.0))
    scale = 1.0 / (temperature.double() * math.log(2.0))
    if plan.running == (True,):
        return scale
    low, high = FITTING_TEMPERATURES
    return torch.where((temperature >= low) & (temperature <= high), 1.0, scale)
