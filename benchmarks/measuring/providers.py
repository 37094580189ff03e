"""Who computes it: every way to the same loss that the benchmark compares, by name.

A factory answers with a Provider for a workload, or raises Unavailable with one sentence
on why there is none here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from measuring.workloads import Problem, Workload


class Unavailable(Exception):
    """The provider does not take this workload here; the message says why."""


def autograd_backward(problem: Problem, loss: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, problem.leaves)


@dataclass(frozen=True)
class Provider:
    """A forward that returns the loss with its graph, and the backward through that graph."""

    name: str
    forward: Callable[[Problem], Tensor]
    backward: Callable[[Problem, Tensor], tuple[Tensor, ...]] = autograd_backward
    has_loss: bool = True
    compiles_per_shape: bool = False
    num_pair_matrices: int = 0
    """Matrices of size N×M that it holds at its peak; 0: memory grows linearly."""

    def step(self, problem: Problem) -> tuple[Tensor, ...]:
        return self.backward(problem, self.forward(problem))


def dense_loss(problem: Problem) -> Tensor:
    """The loss as SupContrast computes it: all scores, float masks, log-softmax."""
    workload = problem.workload
    rows = F.normalize(problem.features)
    cols = rows if problem.contrast_features is None else F.normalize(problem.contrast_features)
    scores = (rows @ cols.T).to(torch.promote_types(rows.dtype, torch.float32))
    scores = scores / workload.temperature
    scores = scores - scores.max(1, keepdim=True).values.detach()
    others = torch.ones_like(scores)
    if problem.contrast_features is None:
        others = others - torch.eye(len(rows), dtype=scores.dtype, device=scores.device)
    positive = (problem.labels[:, None] == problem.col_labels).to(scores.dtype) * others

    exp_scores = scores.exp()
    if workload.denominator == "all":
        total = (exp_scores * others).sum(1, keepdim=True)
    else:
        total = (exp_scores * (others - positive)).sum(1, keepdim=True)
    if workload.denominator == "one_positive":
        total = total + exp_scores
    if workload.summation == "out":
        log_prob = scores - total.log()
        return -((positive * log_prob).sum(1) / positive.sum(1)).mean()
    return -((positive * exp_scores / total).sum(1) / positive.sum(1)).log().mean()


def _matmuls_forward(problem: Problem) -> Tensor:
    return problem.features.detach() @ problem.cols.detach().T


def _matmuls_backward(problem: Problem, scores: Tensor) -> tuple[Tensor, ...]:
    return scores @ problem.cols.detach(), scores.T @ problem.features.detach()


def _dense(workload: Workload) -> Provider:
    return Provider("dense", dense_loss, num_pair_matrices=6)


def _dense_compiled(workload: Workload) -> Provider:
    torch.compiler.reset()
    return Provider(
        "dense-compiled",
        torch.compile(dense_loss, fullgraph=True, dynamic=False),
        compiles_per_shape=True,
        num_pair_matrices=1,
    )


def _matmuls(workload: Workload) -> Provider:
    return Provider(
        "matmuls", _matmuls_forward, _matmuls_backward, has_loss=False, num_pair_matrices=1
    )


def _pytorch_metric_learning(workload: Workload) -> Provider:
    if (workload.summation, workload.denominator) != ("out", "all"):
        raise Unavailable("has the out/all loss only")
    try:
        from pytorch_metric_learning.losses import SupConLoss
    except ModuleNotFoundError:
        raise Unavailable("not installed: pip install pytorch-metric-learning") from None
    supcon = SupConLoss(temperature=workload.temperature)

    def forward(problem: Problem) -> Tensor:
        loss = supcon(
            problem.features,
            problem.labels,
            ref_emb=problem.contrast_features,
            ref_labels=problem.contrast_labels,
        )
        assert isinstance(loss, Tensor)
        return loss

    return Provider("pytorch-metric-learning", forward, num_pair_matrices=13)


def _supcon_kernels(name: str, workload: Workload) -> Provider:
    backend, _, widened = name.partition(" ")
    try:
        from supcon_kernels import supcon_loss
    except ModuleNotFoundError:
        raise Unavailable("not installed: pip install supcon-kernels") from None

    def forward(problem: Problem) -> Tensor:
        features, contrast = problem.features, problem.contrast_features
        if widened:
            features, contrast = features.float(), None if contrast is None else contrast.float()
        try:
            return supcon_loss(
                features,
                problem.labels,
                contrast_features=contrast,
                contrast_labels=problem.contrast_labels,
                temperature=workload.temperature,
                summation=workload.summation,
                denominator=workload.denominator,
                backend=backend,
            )
        except ValueError as refusal:
            raise Unavailable(str(refusal)) from None

    return Provider(f"{OURS}{name}]", forward)


def _memeff(workload: Workload) -> Provider:
    _refuse_without_gpu(workload)
    try:
        from memeff import MemoryEfficientCLIPLoss
    except ModuleNotFoundError:
        raise Unavailable("not installed: pip install memeff") from None
    clip = MemoryEfficientCLIPLoss(temperature=workload.temperature, stable=False)

    def forward(problem: Problem) -> Tensor:
        loss = clip(problem.features, problem.cols)
        assert isinstance(loss, Tensor)
        return loss

    return Provider("memeff", forward, has_loss=False)


def _inf_cl(workload: Workload) -> Provider:
    _refuse_without_gpu(workload)
    try:
        from inf_cl import cal_flash_loss
    except ModuleNotFoundError:
        raise Unavailable("not installed: pip install inf-cl") from None

    def forward(problem: Problem) -> Tensor:
        rows, cols = F.normalize(problem.features), F.normalize(problem.cols)
        head_dim = min(workload.dim, 256)
        loss = cal_flash_loss(rows, cols, scale=1 / workload.temperature, head_dim=head_dim)
        assert isinstance(loss, Tensor)
        return loss.mean()

    return Provider("inf-cl", forward, has_loss=False)


def _siglip(workload: Workload) -> Provider:
    _refuse_without_gpu(workload)
    try:
        from siglip_kernel import fused_siglip_loss
    except ModuleNotFoundError:
        raise Unavailable("not installed: pip install siglip-kernel") from None
    log_temperature = torch.tensor(-math.log(workload.temperature), device=workload.device)
    bias = torch.tensor(-10.0, device=workload.device)

    def forward(problem: Problem) -> Tensor:
        rows, cols = F.normalize(problem.features), F.normalize(problem.cols)
        loss = fused_siglip_loss(rows, cols, log_temperature, bias)
        assert isinstance(loss, Tensor)
        return loss

    return Provider("siglip-kernel", forward, has_loss=False)


class _ChunkedLoss(torch.autograd.Function):
    """The loss of normalised rows by torch.mm, a chunk of anchors at a time; scores are made twice."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, cols: Tensor, problem: Problem) -> Tensor:
        losses, lse, num_positives = (torch.empty(len(rows), device=rows.device) for _ in range(3))
        for chunk, scores, positive in _chunks(rows, cols, problem):
            lse[chunk], num_positives[chunk] = scores.logsumexp(1), positive.sum(1)
            pulls = scores.masked_fill_(~positive, 0).sum(1)
            losses[chunk] = lse[chunk] - pulls / num_positives[chunk]
        ctx.save_for_backward(rows, cols, lse, num_positives)
        ctx.problem = problem
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        rows, cols, lse, num_positives = ctx.saved_tensors
        grad_rows = torch.empty(rows.shape, device=rows.device)
        grad_cols = torch.zeros(cols.shape, device=cols.device)
        for chunk, scores, positive in _chunks(rows, cols, ctx.problem):
            pull = scores.sub_(lse[chunk, None]).exp_()
            pull -= positive / num_positives[chunk, None]
            pull = pull.to(rows.dtype)
            grad_rows[chunk] = _mm_to_float32(pull, cols)
            grad_cols += _mm_to_float32(pull.T, rows[chunk])
        scale = grad_loss / (len(rows) * ctx.problem.workload.temperature)
        return (grad_rows * scale).to(rows.dtype), (grad_cols * scale).to(cols.dtype), None


def _chunks(rows: Tensor, cols: Tensor, problem: Problem) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Anchors, their scores against all columns, and which of these are positives."""
    num_rows = max(128, CHUNK_SCORES // len(cols))
    for start in range(0, len(rows), num_rows):
        chunk = slice(start, min(start + num_rows, len(rows)))
        scores = _mm_to_float32(rows[chunk], cols.T).div_(problem.workload.temperature)
        positive = problem.labels[chunk, None] == problem.col_labels
        if problem.contrast_features is None:
            scores.diagonal(start).fill_(-torch.inf)
            positive.diagonal(start).fill_(False)
        yield chunk, scores, positive


def _mm_to_float32(left: Tensor, right: Tensor) -> Tensor:
    if left.device.type == "cuda" and left.dtype.itemsize == 2:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


def _chunked(workload: Workload) -> Provider:
    if (workload.summation, workload.denominator) != ("out", "all"):
        raise Unavailable("has the out/all loss only")

    def forward(problem: Problem) -> Tensor:
        rows = F.normalize(problem.features)
        cols = rows if problem.contrast_features is None else F.normalize(problem.contrast_features)
        loss = _ChunkedLoss.apply(rows, cols, problem)
        assert isinstance(loss, Tensor)
        return loss

    return Provider("chunked", forward)


def _refuse_without_gpu(workload: Workload) -> None:
    if workload.device != "cuda":
        raise Unavailable("runs on CUDA only")


FACTORIES: dict[str, Callable[[Workload], Provider]] = {
    "dense": _dense,
    "dense-compiled": _dense_compiled,
    "pytorch-metric-learning": _pytorch_metric_learning,
    "matmuls": _matmuls,
}
GPU_PEERS: dict[str, Callable[[Workload], Provider]] = {
    "chunked": _chunked,
    "memeff": _memeff,
    "inf-cl": _inf_cl,
    "siglip-kernel": _siglip,
}
"""Compared on a GPU alone. All but the first compute CLIP's loss or SigLIP's on the same rows, which
is another one, so they are not checked."""
CHUNK_SCORES = 1 << 26
OURS = "supcon_kernels["
SPECIFICATION = "reference"
"""The backend that is a specification, not a contender: measured only when named."""


def provider_names() -> list[str]:
    """The others, then supcon_kernels once for each of its backends that is ready here."""
    return [*FACTORIES, *(f"{OURS}{backend}]" for backend in _ready_backends())]


def make_provider(name: str, workload: Workload) -> Provider:
    """Build the named provider for a workload, or raise Unavailable.

    ``supcon_kernels[native widened]`` is given float32 copies of 16-bit features.
    """
    if name.startswith(OURS):
        return _supcon_kernels(name.removeprefix(OURS).removesuffix("]"), workload)
    return (FACTORIES | GPU_PEERS)[name](workload)


def _ready_backends() -> list[str]:
    try:
        from supcon_kernels import available_backends
    except ModuleNotFoundError:
        return []
    return [
        name
        for name, why_not in available_backends().items()
        if why_not is None and name != SPECIFICATION
    ]
