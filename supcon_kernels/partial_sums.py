"""What is known of anchors from some of their contrasts, which adds up to what all of them give.

Sums are (3, n) of n anchors, natural logarithms, in the accumulation dtype:

- the log-sum-exp of the denominator;
- over the positives the sum of weight times logit; with summation="in" the log-sum-exp of weight times
  e^logit;
- the positives' total weight.

With denominator="one_positive" they are (4, n). The first is then known of all negatives before a
positive is looked at, and a positive's logit is log q, of its probability q against these negatives.
The fourth is over the positives the sum of weight times 1 - q; with summation="in" the logarithm of
the sum of weight times q (1 - q).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from supcon_kernels.problem import Problem, accumulation_dtype


def count(problem: Problem) -> int:
    """How many sums there are."""
    return 4 if problem.denominator == "one_positive" else 3


def over_nothing(problem: Problem, anchors: Tensor) -> Tensor:
    """The sums of anchors (n, D) without a contrast."""
    total = anchors.new_zeros(len(anchors), dtype=accumulation_dtype(anchors))
    lse = torch.full_like(total, -torch.inf)
    of_positives = total if problem.summation == "out" else lse
    return torch.stack((lse, of_positives, total, of_positives)[: count(problem)])


def merged(problem: Problem, parts: Sequence[Tensor]) -> Tensor:
    """The sums over the contrasts of all ``parts``, added in their order."""
    # Of all negatives all parts have the same, but for one over nothing.
    of_lse = torch.maximum if problem.denominator == "one_positive" else torch.logaddexp
    of_positives = torch.add if problem.summation == "out" else torch.logaddexp
    add: Sequence[Callable[..., Tensor]] = (of_lse, of_positives, torch.add, of_positives)
    return torch.stack([functools.reduce(f, of_parts) for f, of_parts in zip(add, zip(*parts))])


def contributes(problem: Problem, sums: Tensor) -> Tensor:
    """(n,) bool: has a positive and, where only negatives are below, a negative; or is not a number."""
    has_positive = sums[2] != 0
    if problem.denominator == "only_negatives":
        return has_positive & (sums[0] != -torch.inf)
    return has_positive


def losses(problem: Problem, sums: Tensor) -> Tensor:
    """(n,) in the working dtype; 0 where an anchor does not contribute."""
    lse, of_positives, total = sums[:3]
    loss = -of_positives / total if problem.summation == "out" else total.log() - of_positives
    if problem.denominator != "one_positive":
        loss = lse + loss
    if problem.denominator != "only_negatives":  # of probabilities: below 0 it is roundings
        loss = loss.clamp(min=0.0)
    return torch.where(contributes(problem, sums), loss, 0.0).to(problem.dtype)


def softmax_weights(problem: Problem, sums: Tensor) -> Tensor:
    """(n,) the weight of the softmax part of each anchor's gradient."""
    if problem.denominator != "one_positive":
        return torch.ones_like(sums[0])
    _, of_positives, total, rest = sums
    weight = rest / total if problem.summation == "out" else (rest - of_positives).exp()
    return torch.where(total == 0, 0.0, weight)
