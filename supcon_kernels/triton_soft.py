"""What soft labels add to the Triton kernels: the positives' part of the loss and of the gradient.

The pair kernels are given no labels. They make the sums of all powers, and the softmax part of the
gradient. The rest is put where they would have left it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from supcon_kernels.backends.protocol import Anchors
from supcon_kernels.triton_launch import FITTING_TEMPERATURES

if TYPE_CHECKING:
    from supcon_kernels.triton_call import Call, Side

# Rows of the statistics: the total weight of an anchor's positives is the first times 2 to the second.
_TOTAL, _EXPONENT = 1, 4
# Row of the sums where those of positives are, and of the weights where their pull is.
_POSITIVES, _PULL = 2, 2


def put_means(call: Call, owner: Side, sums: Tensor) -> Tensor:
    """Let each of a side's anchors have one positive, of its positives' mean exponent; (N,) what they weigh.

    Args:
        call: whose labels.
        owner: the side.
        sums: (pieces, 4, padded rows) of its forward.
    """
    soft, streamed = call.soft_of(owner)
    products, total = soft.means(owner.used(call.padded_dim), streamed.used(call.padded_dim))
    poison = call.problem.target_poison()
    total = total + poison
    sums[:, _POSITIVES:].zero_()  # nothing is shifted
    sums[0, _POSITIVES, : len(total)] = products * _exponent_scale(call) + poison
    owner.num_positives[: len(total)] = total != 0
    return total


def keep_totals(stats: Tensor, total: Tensor) -> None:
    """Put the positives' total weight, which may be beyond float32, among the statistics (5, N)."""
    mantissa, exponent = torch.frexp(total)
    stats[_TOTAL] = torch.where(total == 0, torch.inf, mantissa)
    stats[_EXPONENT] = exponent


def taken_pull(weights: Tensor, anchors: Anchors) -> Tensor:
    """(n,) float64: what each anchor's positives weigh, which is taken out of the weights (4, padded n)."""
    pull = weights[_PULL, : anchors.stats.shape[1]].double()
    weights[_PULL].zero_()
    return pull * torch.exp2(-anchors.stats[_EXPONENT].double())


def add_attraction(call: Call, owner: Side, pieces: Tensor) -> None:
    """Add what positives do to the gradient of a side, the first of whose pieces this changes."""
    soft, streamed = call.soft_of(owner)
    pulls = call.soft_pulls if owner is call.rows else call.soft_pulls[::-1]
    first = pieces.view(-1, owner.padded, call.padded_dim)[0]
    first[: owner.num_rows] -= soft.attraction(*pulls, streamed.used(call.padded_dim))


def _exponent_scale(call: Call) -> Tensor | float:
    """What products of prepared rows are multiplied by to be exponents of 2."""
    running, tau = call.plan.running, call.temperature
    if running == (False,):
        return 1.0
    if not isinstance(tau, Tensor):
        return 1.0 / (tau * math.log(2.0))
    scale = 1.0 / (tau.double() * math.log(2.0))
    if running == (True,):
        return scale
    low, high = FITTING_TEMPERATURES
    return torch.where((tau >= low) & (tau <= high), 1.0, scale)
