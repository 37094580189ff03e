"""What is known of anchors from some of their contrasts, which adds up to what all of them give.

Sums are (3, n) of n anchors, natural logarithms, in the accumulation dtype:

- the log-sum-exp of the denominator;
- over the positives the sum of weight times logit; with summation="in" the log-sum-exp of weight times
  e^logit;
- the positives' total weight.

The denominator is not "one_positive", whose positives are looked at when all negatives are known.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from supcon_kernels.problem import Problem, accumulation_dtype


def over_nothing(problem: Problem, anchors: Tensor) -> Tensor:
    """The sums (3, n) of anchors (n, D) without a contrast."""
    total = anchors.new_zeros(len(anchors), dtype=accumulation_dtype(anchors))
    lse = torch.full_like(total, -torch.inf)
    return torch.stack((lse, total if problem.summation == "out" else lse, total))


def merged(problem: Problem, parts: Sequence[Tensor]) -> Tensor:
    """The sums (3, n) over the contrasts of all ``parts``, added in their order."""
    lse, of_positives, total = parts[0]
    for other in parts[1:]:
        lse = torch.logaddexp(lse, other[0])
        add = torch.add if problem.summation == "out" else torch.logaddexp
        of_positives = add(of_positives, other[1])
        total = total + other[2]
    return torch.stack((lse, of_positives, total))


def contributes(problem: Problem, sums: Tensor) -> Tensor:
    """(n,) bool: has a positive and, where only negatives are below, a negative; or is not a number."""
    has_positive = sums[2] != 0
    if problem.denominator == "only_negatives":
        return has_positive & (sums[0] != -torch.inf)
    return has_positive


def losses(problem: Problem, sums: Tensor) -> Tensor:
    """(n,) in the working dtype; 0 where an anchor does not contribute."""
    lse, of_positives, total = sums
    if problem.summation == "out":
        loss = lse - of_positives / total
    else:
        loss = lse - of_positives + total.log()
    if problem.denominator == "all":  # what the positives hold, all hold: below 0 it is roundings
        loss = loss.clamp(min=0.0)
    return torch.where(contributes(problem, sums), loss, 0.0).to(problem.dtype)
