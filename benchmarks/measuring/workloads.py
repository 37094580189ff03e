"""What is measured: one call of the loss, its seeded inputs, and its float64 truth.

The truth is written apart from every provider, in blocks of anchors, so that it fits in
memory at any size that a dense provider can reach.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

SEED = 20200423
TRUTH_BLOCK_ROWS = 512
TRUTH_MAX_ROWS = 8192
ERROR_BOUND = {"float64": 1e-11, "float32": 5e-5, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest accepted error of a loss, relative where it exceeds 1, and of a gradient, relative to
its largest element."""


@dataclass(frozen=True)
class Workload:
    """One call: (num_rows, dim) anchors against themselves, or against num_cols other rows."""

    num_rows: int
    dim: int = 128
    num_cols: int = 0  # 0: square, the anchors contrast with each other
    num_classes: int = 10
    temperature: float = 0.1
    summation: str = "out"
    denominator: str = "all"
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def num_pairs(self) -> int:
        return self.num_rows * (self.num_cols or self.num_rows)

    @property
    def num_flops(self) -> int:
        """Least FLOP of forward and backward: 4 N²D by symmetry, 6 NMD without it."""
        return (6 if self.num_cols else 4) * self.num_pairs * self.dim

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def error_bound(self) -> float:
        return ERROR_BOUND[self.dtype]


@dataclass(frozen=True)
class Problem:
    """The inputs of one call: unnormalised leaves with gradient, and labels."""

    workload: Workload
    features: Tensor  # (N, D)
    labels: Tensor  # (N,) int64
    contrast_features: Tensor | None = None  # (M, D)
    contrast_labels: Tensor | None = None  # (M,) int64

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What receives a gradient."""
        if self.contrast_features is None:
            return (self.features,)
        return (self.features, self.contrast_features)

    @property
    def cols(self) -> Tensor:
        return self.features if self.contrast_features is None else self.contrast_features

    @property
    def col_labels(self) -> Tensor:
        return self.labels if self.contrast_labels is None else self.contrast_labels


def make_problem(workload: Workload) -> Problem:
    """Draw balanced, shuffled classes and features scattered around their class's centre.

    Fewer rows than classes are of classes far apart, as a batch before a memory is.
    """
    generator = torch.Generator().manual_seed(SEED)
    centres = torch.randn(workload.num_classes, workload.dim, generator=generator)

    def draw(num: int) -> tuple[Tensor, Tensor]:
        stride = max(workload.num_classes // num, 1)
        labels = torch.randperm(num, generator=generator) * stride % workload.num_classes
        features = centres[labels] + torch.randn(num, workload.dim, generator=generator)
        leaf = features.to(workload.device, workload.torch_dtype).requires_grad_()
        return leaf, labels.to(workload.device)

    anchors = draw(workload.num_rows)
    return Problem(workload, *anchors, *(draw(workload.num_cols) if workload.num_cols else ()))


def make_checked_problem(workload: Workload) -> Problem:
    """The problem on which correctness is checked: the measured one where its truth is cheap."""
    return make_problem(
        replace(
            workload,
            num_rows=min(workload.num_rows, TRUTH_MAX_ROWS),
            num_cols=min(workload.num_cols, TRUTH_MAX_ROWS),
        )
    )


@dataclass(frozen=True)
class Truth:
    """Loss and gradients in float64 on the very inputs that the providers get."""

    loss: Tensor
    grads: tuple[Tensor, ...]

    def errors(self, loss: Tensor, grads: tuple[Tensor, ...]) -> tuple[float, float]:
        """Error of the loss, and the worst gradient's, each on the scale that the bound has."""
        loss_error = (loss.double() - self.loss).abs() / self.loss.abs().clamp(min=1)
        grad_errors = [
            (got.double() - want).abs().max().item() / want.abs().max().item()
            for got, want in zip(grads, self.grads, strict=True)
        ]
        return loss_error.item(), worst(grad_errors)


def worst(errors: Iterable[float]) -> float:
    """The largest error, and NaN is the worst of all: built-in max() may overlook it."""
    return torch.tensor(list(errors), dtype=torch.float64).max().item()


def compute_truth(problem: Problem) -> Truth:
    """Evaluate the loss in float64, one block of anchors at a time."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in problem.leaves]
    grads = [torch.zeros_like(leaf) for leaf in leaves]
    total = torch.zeros((), dtype=torch.float64, device=problem.features.device)
    num_rows = problem.workload.num_rows
    for start in range(0, num_rows, TRUTH_BLOCK_ROWS):
        block = slice(start, min(start + TRUTH_BLOCK_ROWS, num_rows))
        loss = _block_loss(problem, leaves[0], leaves[-1], block) / num_rows
        for grad, part in zip(grads, torch.autograd.grad(loss, leaves), strict=True):
            grad += part
        total += loss.detach()
    return Truth(total, tuple(grads))


def _block_loss(problem: Problem, features: Tensor, contrasts: Tensor, block: slice) -> Tensor:
    """Sum of the losses of the anchors in `block`, by log-sum-exps over sets of columns."""
    workload = problem.workload
    rows, cols = F.normalize(features[block]), F.normalize(contrasts)
    scores = rows @ cols.T / workload.temperature
    positive = problem.labels[block, None] == problem.col_labels
    negative = ~positive
    if problem.contrast_features is None:
        anchor = torch.arange(block.stop - block.start, device=scores.device)
        positive[anchor, anchor + block.start] = False
    num_positives = positive.sum(1).double()

    if workload.denominator == "all":
        lse = _lse_over(scores, positive | negative)
    else:
        lse = _lse_over(scores, negative)
    if workload.denominator == "one_positive":
        lse = torch.logaddexp(lse, scores)
    log_prob = scores - lse
    if workload.summation == "out":
        return -(log_prob.masked_fill(~positive, 0).sum(1) / num_positives).sum()
    return (num_positives.log() - _lse_over(log_prob, positive).squeeze(1)).sum()


def _lse_over(scores: Tensor, chosen: Tensor) -> Tensor:
    return scores.masked_fill(~chosen, -torch.inf).logsumexp(1, keepdim=True)
