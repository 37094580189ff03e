"""The public loss: validates a call, turns views into rows, picks the backend and reduces."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from supcon_kernels import backends, distributed, distributed_op, op, ranks, validation
from supcon_kernels.backends import reference
from supcon_kernels.problem import Problem
from supcon_kernels.validation import Call

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Labels made here (one class a sample) never match it, whatever the caller's ignore_index is.
_NOTHING_IGNORED = -1


def supcon_loss(
    features: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    contrast_features: Tensor | None = None,
    contrast_labels: Tensor | None = None,
    self_offset: int | None = None,
    symmetric: bool = False,
    temperature: float | Tensor = 0.07,
    base_temperature: float | None = None,
    contrast_mode: str = "all",
    summation: str = "out",
    denominator: str = "all",
    normalize: bool = True,
    reduction: str = "mean",
    ignore_index: int = -100,
    group: ProcessGroup | str | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Supervised contrastive loss, computed without the N×N matrix.

    With unit rows z and P(i) the other rows of anchor i's class, the default is

        L_i = -1/|P(i)| * sum over p in P(i) of log( exp(z_i·z_p/τ) / sum over a ≠ i of exp(z_i·z_a/τ) )

    averaged over the anchors. In plain PyTorch, for features (N, D) and integer labels (N,):

        z = F.normalize(features, dim=1)
        s = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
        positive = (labels[:, None] == labels).fill_diagonal_(False)
        log_p = s.log_softmax(dim=1).masked_fill(~positive, 0.0)
        loss = -(log_p.sum(dim=1) / positive.sum(dim=1).clamp(min=1)).mean()

    Args:
        features: (N, D), or (B, V, D) for V views of each of B samples, which become N = V·B
            rows ordered view by view. float16, bfloat16, float32 or float64.
        labels: (N,) or (B,) integers, also as a column (N, 1). Or (N, C) or (B, C), C > 1, soft
            or multi-hot labels, floats >= 0 or booleans: the dot product of two rows is the weight
            of the pair. Or None: the views of a sample are each other's positives (SimCLR's NT-Xent).
        mask: instead of labels. (B, B), (N, N), or (N, M) with ``contrast_features``, any real
            dtype: > 0 is a positive with that weight, 0 a negative, < 0 is ignored.
        contrast_features: (M, D), on the device of ``features`` and converted to their dtype.
            Anchors are compared with these rows instead of with each other. Only first views are
            anchors then. Without labels, row i is the positive of anchor i.
        contrast_labels: (M,) or (M, C), as ``labels``.
        self_offset: with ``contrast_features``: its row ``self_offset + i`` is anchor i itself
            and is left out of every sum.
        symmetric: with ``contrast_features``: the mean of the losses in both directions, as in
            CLIP. The second one has ``contrast_features`` as anchors. Costs less than two calls. A
            mask (N, M) is used for both.
        temperature: τ > 0, a number or a 0-dim tensor, which may require grad. If it changes from
            step to step under ``torch.compile``, a tensor avoids compiling for each value.
        base_temperature: multiply the loss by temperature / base_temperature; None: do not.
        contrast_mode: "all": all views are anchors. "one": only the first.
        summation: "out" averages log-probabilities over the positives (equation 2). "in"
            takes the logarithm of the averaged probability (equation 3).
        denominator: "all": all other rows (the paper). "one_positive": the positive itself and the
            negatives (SINCERE). "only_negatives": the negatives (DCL).
        normalize: L2-normalise ``features`` and ``contrast_features``; a zero row stays zero.
        reduction: "mean" over all anchors, "positive_mean" over those with a positive (and,
            under "only_negatives", a negative), "sum", or "none".
        ignore_index: a sample with this integer label is neither anchor nor contrast. Its row
            never affects a result, whatever it contains.
        group: "world" (all processes; only this one if torch.distributed is not initialised) or a
            process group: the loss over the rows of all its ranks; docs/scaling.md has the rules.
            "local": only the rows of this rank. None: as "local", with a warning if there are other
            ranks (no warning under ``torch.compile``).
        backend: one of ``available_backends()``; None: the best one that supports the call.

    Returns:
        0-dim loss. With ``reduction="none"`` one loss per anchor: (N,), (V·B,) in the order of the
        rows, (B,) for ``contrast_mode="one"``. float32, or float64 for float64 features. An anchor
        without positives has loss 0. If a row that is not ignored has a non-finite element, the
        loss is NaN. Off the CPU, negative or non-finite soft labels and a non-finite mask make it
        NaN, too: to raise an error, the host would have to wait for the device.

    Under ``torch.func`` and in forward mode the default backend is "reference", the only one that
    they can differentiate. To call ``backward`` twice, pass ``backend="reference"``.

    Raises:
        TypeError: features are not a floating-point tensor, or group is not a process group.
        ValueError: any other argument is not as described; the message names it.

    Example:
        >>> features = encoder(images)                       # (N, D), not normalised
        >>> supcon_loss(features, labels, temperature=0.1).backward()

    Source:
        Khosla et al., Supervised Contrastive Learning, NeurIPS 2020, arXiv 2004.11362.
    """
    call = Call(
        features=features,
        labels=_canonical(labels),
        mask=mask,
        contrast_features=contrast_features,
        contrast_labels=_canonical(contrast_labels),
        self_offset=self_offset,
        symmetric=symmetric,
        temperature=temperature,
        base_temperature=base_temperature,
        contrast_mode=contrast_mode,
        summation=summation,
        denominator=denominator,
        normalize=normalize,
        reduction=reduction,
        ignore_index=ignore_index,
    )
    if group is None:
        ranks.warn_if_local()
    if (members := ranks.resolved(group)) is not None:
        is_traced = torch.compiler.is_compiling()
        of_all = distributed_op.traced_loss if is_traced else distributed.loss_of_all
        problem, loss = of_all(lambda: _prepared(call, backend), call, members)
    else:
        problem, chosen = _prepared(call, backend)
        if chosen == "reference":
            loss = reference.loss_of(problem, reduction)
        else:
            loss = op.loss_of(problem, chosen, reduction)
    if base_temperature is not None:
        loss = loss * (problem.tau / base_temperature)
    return loss


def _prepared(call: Call, backend: str | None) -> tuple[Problem, str]:
    """The problem of a call that is found right, and the backend that takes it."""
    validation.check(call)
    features, contrasts = call.features, call.contrast_features
    if contrasts is not None:
        contrasts = contrasts.to(features.dtype)
    rows, cols = _rows_and_cols(features, contrasts, call.contrast_mode)
    labels, contrast_labels, ignore_index = call.labels, call.contrast_labels, call.ignore_index
    if labels is None and call.mask is None:
        ignore_index = _NOTHING_IGNORED
        labels = torch.arange(features.shape[0], device=features.device)
        if contrasts is not None:
            contrast_labels = torch.arange(contrasts.shape[0], device=features.device)
    row_labels = col_labels = _as_numbers(labels)
    if contrasts is not None:
        col_labels = _as_numbers(contrast_labels)

    is_tensor = isinstance(call.temperature, Tensor)
    problem = Problem(
        rows=rows,
        cols=cols,
        row_labels=row_labels,
        col_labels=None if cols is None else col_labels,
        weights=call.mask,
        temperature_tensor=call.temperature if is_tensor else None,
        temperature=math.nan if is_tensor else float(call.temperature),
        # Without other rows the anchors are the contrasts, or the first of them.
        self_offset=0 if contrasts is None else call.self_offset,
        summation=call.summation,
        denominator=call.denominator,
        normalize=call.normalize,
        ignore_index=ignore_index,
        tf32=features.is_cuda and _allows_tf32(),
        symmetric=call.symmetric,
    )
    return problem, backends.choose(problem, backend)


def _rows_and_cols(
    features: Tensor, contrast_features: Tensor | None, contrast_mode: str
) -> tuple[Tensor, Tensor | None]:
    """Anchors (N, D) or (B, V, D), and contrasts, or None where they are the anchors themselves."""
    first = features if features.ndim == 2 else features[:, 0]
    if contrast_features is not None:
        return first, contrast_features
    if features.ndim == 2 or contrast_mode == "all":
        return features, None
    return first, features


def _canonical(labels: Tensor | None) -> Tensor | None:
    """A column of integers as a vector, multi-hot booleans as floats."""
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        return labels
    if labels.dtype == torch.bool:
        return labels.float()
    is_column = labels.shape[1] == 1 and labels.dtype in validation.INTEGERS
    return labels.squeeze(1) if is_column else labels


def _as_numbers(labels: Tensor | None) -> Tensor | None:
    """The labels, integers as int64."""
    return labels if labels is None or labels.is_floating_point() else labels.long()


def _allows_tf32() -> bool:
    """Whether torch was told that its own products of float32 on CUDA may be of TF32."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return bool(matmul.fp32_precision == "tf32")
    return bool(matmul.allow_tf32)


# Dynamo reads it as a constant, and compiles again where it has changed.
_allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


class SupConLoss(nn.Module):
    """``supcon_loss`` as a module: a drop-in for the class of that name in the SupContrast repository.

    It keeps that class's positional order and its scale: the loss is multiplied by
    temperature / base_temperature. All arguments are those of ``supcon_loss``.

    Args:
        temperature: τ > 0. An ``nn.Parameter`` is learned; it needs ``base_temperature=None``.
        contrast_mode: "all" views are anchors, or only the first: "one".
        base_temperature: None: do not scale the loss.

    Example:
        >>> criterion = SupConLoss(temperature=0.1)
        >>> loss = criterion(features, labels)               # features (B, V, D), labels (B,)
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        contrast_mode: str = "all",
        base_temperature: float | None = 0.07,
        *,
        summation: str = "out",
        denominator: str = "all",
        normalize: bool = True,
        reduction: str = "mean",
        ignore_index: int = -100,
        group: ProcessGroup | str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature
        self.summation = summation
        self.denominator = denominator
        self.normalize = normalize
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.group = group
        self.backend = backend

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        contrast_features: Tensor | None = None,
        contrast_labels: Tensor | None = None,
        self_offset: int | None = None,
        symmetric: bool = False,
    ) -> Tensor:
        """The loss of ``features`` (B, V, …), trailing dimensions flattened, or (N, D)."""
        return supcon_loss(
            features.flatten(2) if features.ndim > 3 else features,
            labels,
            mask=mask,
            contrast_features=contrast_features,
            contrast_labels=contrast_labels,
            self_offset=self_offset,
            symmetric=symmetric,
            temperature=self.temperature,
            base_temperature=self.base_temperature,
            contrast_mode=self.contrast_mode,
            summation=self.summation,
            denominator=self.denominator,
            normalize=self.normalize,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            group=self.group,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The options that most often differ, for ``print(model)``."""
        return (
            f"temperature={self.temperature}, contrast_mode={self.contrast_mode!r}, "
            f"base_temperature={self.base_temperature}, summation={self.summation!r}, "
            f"denominator={self.denominator!r}, reduction={self.reduction!r}"
        )
