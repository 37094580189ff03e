"""Supervised contrastive loss without the N×N matrix: exact, in little memory, as a PyTorch operator."""

import warnings

from supcon_kernels._version import __version__
from supcon_kernels.backends import available_backends, native
from supcon_kernels.clip import ClipLoss
from supcon_kernels.gradcache import grad_cache_backward
from supcon_kernels.loss import SupConLoss, supcon_loss
from supcon_kernels.queue import LabelQueue

__all__ = [
    "ClipLoss",
    "LabelQueue",
    "SupConLoss",
    "__version__",
    "available_backends",
    "grad_cache_backward",
    "supcon_loss",
]

if (_reason := native.unavailable()) is not None:
    warnings.warn(
        "supcon_kernels computes on the CPU by its 'tiled' backend, which is several times slower "
        f"than its own kernel: {_reason}",
        stacklevel=2,
    )
