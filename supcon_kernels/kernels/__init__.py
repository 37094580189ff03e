"""The Triton kernels by what they own; docs/kernels.md has the idea, triton_launch.py the launches.

``rows``: a side of the call as the pair kernels take it, and the way back to its features.
``forward`` and ``backward``: the pairs. ``statistics``: a few numbers for each anchor.
``tiles``: what the pair kernels share.
"""

from supcon_kernels.kernels.backward import _backward_kernel, _derivatives_kernel
from supcon_kernels.kernels.forward import _forward_kernel
from supcon_kernels.kernels.rows import _gradient_kernel, _prepare_kernel, _temperature_kernel
from supcon_kernels.kernels.statistics import _loss_kernel, _weights_kernel

__all__ = [
    "_backward_kernel",
    "_derivatives_kernel",
    "_forward_kernel",
    "_gradient_kernel",
    "_loss_kernel",
    "_prepare_kernel",
    "_temperature_kernel",
    "_weights_kernel",
]
