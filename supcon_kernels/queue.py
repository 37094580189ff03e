"""A first-in-first-out memory of past embeddings and their labels, to contrast a batch with."""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from supcon_kernels import ranks
from supcon_kernels.validation import FLOATS, INTEGERS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LabelQueue(nn.Module):
    """The last ``size`` embeddings and labels, oldest first, as buffers of the state_dict.

    Empty slots have zeros and the label ``ignore_index``, so a queue that is not full can be used.
    ``enqueue`` replaces the buffers instead of writing into them. So a loss that was computed before
    can still be differentiated.

    Args:
        size: number of slots, >= 1.
        dim: width D of an embedding, >= 1.
        ignore_index: the label of an empty slot; the one given to the loss.
        dtype: of the stored embeddings; None: torch's default.
        device: where the buffers live.

    Raises:
        ValueError: ``size`` or ``dim`` below 1, or a ``dtype`` that is not floating-point.

    Example:
        >>> queue = LabelQueue(8192, 128)
        >>> loss = supcon_loss(features, labels, contrast_features=queue.features,
        ...                    contrast_labels=queue.labels)
        >>> queue.enqueue(keys, labels)
    """

    features: Tensor
    labels: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        ignore_index: int = -100,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            if not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if dtype not in (None, *FLOATS):
            raise ValueError(f"dtype must be None or one of {list(FLOATS)}, got {dtype}")
        # Buffers made under inference_mode could not be part of a loss that is differentiated later.
        with torch.inference_mode(False):
            self.register_buffer("features", torch.zeros(size, dim, dtype=dtype, device=device))
            empty = torch.full((size,), ignore_index, dtype=torch.int64, device=device)
            self.register_buffer("labels", empty)

    def extra_repr(self) -> str:
        """The size and the width, for ``print(queue)``."""
        return "size={}, dim={}".format(*self.features.shape)

    @torch.inference_mode(False)
    @torch.no_grad()
    def enqueue(
        self, features: Tensor, labels: Tensor, *, group: ProcessGroup | str | None = None
    ) -> None:
        """Append a batch and drop the oldest entries. Of more than ``size`` rows the last are kept.

        Args:
            features: (N, D), cast to the queue's dtype and detached.
            labels: (N,) integers.
            group: a ``torch.distributed`` process group, or "world". Every rank makes the call, with
                any number of rows. The rows of all ranks are appended in the order of the ranks, so
                equal queues stay equal. None or "local": only the rows of this rank.

        Raises:
            ValueError: wrong shapes or dtypes; with ``group``, on any of its ranks, or queues of
                different sizes.
            TypeError: ``group`` is not a process group.
        """
        size = len(self.labels)
        group = ranks.resolved(group)
        if group is None:
            features, labels = self._checked(features, labels)
        else:
            features, labels = ranks.rows_of_all(
                lambda: self._checked(features, labels), self.features, group
            )
        self.features = torch.cat((self.features, features))[-size:]
        self.labels = torch.cat((self.labels, labels))[-size:]

    def _checked(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The batch as the queue holds it."""
        dim = self.features.shape[1]
        for name, x in (("features", features), ("labels", labels)):
            if not isinstance(x, Tensor):
                raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
        if features.dtype not in FLOATS or features.ndim != 2 or features.shape[1] != dim:
            raise ValueError(
                f"features must be floating-point of shape (N, {dim}), "
                f"got {features.dtype} of shape {tuple(features.shape)}"
            )
        if labels.shape != features.shape[:1] or labels.dtype not in INTEGERS:
            raise ValueError(
                f"labels must be ({features.shape[0]},) integers, "
                f"got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        return features.to(self.features), labels.to(self.labels)
