"""The loss of both directions of a pair of towers, by each of the ways to call it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from supcon_kernels import supcon_loss

TEMPERATURE = 0.07
LossOfSides = Callable[[Tensor, Tensor], Tensor]


def in_one_call(images: Tensor, texts: Tensor, **more: Any) -> Tensor:
    """The loss by ``symmetric=True``."""
    return supcon_loss(
        images, contrast_features=texts, temperature=TEMPERATURE, symmetric=True, **more
    )


def with_a_mask(images: Tensor, texts: Tensor) -> Tensor:
    """The same loss, whose positives are read from a matrix."""
    return in_one_call(images, texts, mask=_pairs(len(images)))


def with_one_positive(images: Tensor, texts: Tensor) -> Tensor:
    """The same loss, as a row has no other positives, which is found when all negatives are known."""
    return in_one_call(images, texts, denominator="one_positive")


@functools.cache
def _pairs(num_rows: int) -> Tensor:
    return torch.eye(num_rows, dtype=torch.bool)


def in_two_calls(images: Tensor, texts: Tensor) -> Tensor:
    """The loss by a call for each direction."""
    to_text = supcon_loss(images, contrast_features=texts, temperature=TEMPERATURE)
    to_image = supcon_loss(texts, contrast_features=images, temperature=TEMPERATURE)
    return (to_text + to_image) / 2


def by_logits(images: Tensor, texts: Tensor) -> Tensor:
    """The loss in plain PyTorch, with the matrix of all logits."""
    logits = F.normalize(images) @ F.normalize(texts).T / TEMPERATURE
    numbers = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, numbers) + F.cross_entropy(logits.T, numbers)) / 2


WAYS: dict[str, LossOfSides] = {
    "one call": in_one_call,
    "two calls": in_two_calls,
    "matrix of logits": by_logits,
}
VARIANTS: dict[str, LossOfSides] = {
    "one call, a mask": with_a_mask,
    "one call, one_positive": with_one_positive,
}
