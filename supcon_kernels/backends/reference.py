"""The specification: the loss written out densely in plain PyTorch, differentiable any number of times.

It runs outside the operator, on any device, and holds N×M matrices. Everything else is checked against it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from supcon_kernels.problem import Problem, as_asked, mean_of_ways


def unavailable() -> str | None:
    """Why this backend cannot run on this machine, in one sentence; None: it can."""
    return None


def why_not(problem: Problem) -> str | None:
    """Why this backend cannot take ``problem``, in one sentence; None: it can."""
    return None


def loss_of(problem: Problem, reduction: str) -> Tensor:
    """The loss, which autograd differentiates."""
    ways = [_losses(way.by_rows()) for way in problem.ways()]
    return mean_of_ways([as_asked(*losses, reduction)[0] for losses in ways])


def _losses(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """As ``Problem.reduced`` has them."""
    with torch.autocast(problem.rows.device.type, enabled=False):
        rows, cols = problem.embeddings()
        s = rows @ cols.T / problem.tau
        w = problem.pair_weights(0, rows.shape[0])
        loss, contributes = pair_loss(s, w, problem.summation, problem.denominator)
        loss = torch.where(problem.row_ignored(), 0.0, loss.to(problem.dtype) + problem.poison())
    return problem.reduced(loss, contributes)


def pair_loss(s: Tensor, w: Tensor, summation: str, denominator: str) -> tuple[Tensor, Tensor]:
    """The six losses of anchors with similarities ``s`` (n, M) and pair weights ``w`` (n, M).

    p_ij is the probability of positive j among the columns of its denominator; ``out`` averages
    log p_ij over the positives, ``in`` takes the logarithm of their average.

    Returns:
        Loss (n,) and whether the anchor contributes (n,): it has a positive and, where only
        negatives stand in the denominator, a negative. The loss is 0 where it does not.
    """
    positive, negative = w > 0, w == 0
    weight = w.clamp(min=0.0)
    total = weight.sum(dim=1)
    contributes = total > 0
    if denominator == "only_negatives":
        contributes = contributes & negative.any(dim=1)
    total = torch.where(contributes, total, 1.0)

    lse = masked_logsumexp(s, positive | negative if denominator == "all" else negative)[:, None]
    log_p = F.logsigmoid(s - lse) if denominator == "one_positive" else s - lse
    if summation == "out":
        loss = -torch.where(positive, weight * log_p, 0.0).sum(dim=1) / total
    else:
        log_weight = torch.where(positive, weight, 1.0).log()
        loss = total.log() - masked_logsumexp(log_p + log_weight, positive)
    return torch.where(contributes, loss, 0.0), contributes


def masked_logsumexp(x: Tensor, mask: Tensor) -> Tensor:
    """(n,) log of the sum of exp(x) (n, M) over ``mask``.

    Where a row of the mask is empty the result is a very negative finite number instead of
    minus infinity, so that neither values nor gradients become NaN further on.
    """
    floor = torch.finfo(x.dtype).min / 4
    x = torch.where(mask, x, floor)
    if x.shape[1] == 0:
        return x.sum(dim=1) + floor
    largest = x.detach().amax(dim=1, keepdim=True)
    total = torch.where(mask, (x - largest).exp(), 0.0).sum(dim=1)
    empty = ~mask.any(dim=1)
    return torch.where(empty, floor, torch.where(empty, 1.0, total).log() + largest[:, 0])
