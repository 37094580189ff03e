"""Products of 16-bit features that are accumulated in float32, on devices with units for them."""

from __future__ import annotations

import torch
from torch import Tensor

# torch.mm takes out_dtype from torch 2.8 on.
_HAS_OUT_DTYPE = "dtype" in torch.ops.aten.mm.overloads()
# The oldest compute capability with tensor cores for it.
_CAPABILITIES = {torch.float16: (7, 0), torch.bfloat16: (8, 0)}
# float16 is scaled to at most this: far above its subnormals, and within its range.
_LARGEST_EXPONENT = 14


def short_dtype(features: Tensor) -> torch.dtype | None:
    """The 16-bit dtype in which these features are multiplied, None where it is the working dtype."""
    capability = _CAPABILITIES.get(features.dtype)
    is_able = features.is_cuda and torch.version.hip is None and _HAS_OUT_DTYPE
    if capability is None or not is_able:
        return None
    if torch.cuda.get_device_capability(features.device) < capability:
        return None
    return features.dtype


def product(a: Tensor, b: Tensor, dtype: torch.dtype | None) -> Tensor:
    """a @ b, of float32 numbers that a ``dtype`` of 16 bits holds."""
    return a @ b if dtype is None else accumulated(a.to(dtype), b.to(dtype))


def product_in_parts(a: Tensor, b: Tensor, dtype: torch.dtype | None) -> Tensor:
    """a @ b, where ``dtype`` holds b; a is the sum of two of its numbers.

    One of them would lose what is left of a gradient whose terms nearly cancel.
    """
    if dtype is None:
        return a @ b
    scale = None
    if dtype == torch.float16:
        _, exponent = torch.frexp(a.abs().amax() if a.numel() else a.new_zeros(()))
        scale = torch.exp2((_LARGEST_EXPONENT - exponent).to(a.dtype))
        a = a * scale
    high, b = a.to(dtype), b.to(dtype)
    low = (a - high).to(dtype)
    total = accumulated(high, b) + accumulated(low, b)
    return total if scale is None else total / scale


def add_product(total: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype | None) -> None:
    """Add ``product_in_parts``."""
    if dtype is None:
        total.addmm_(a, b)
    else:
        total += product_in_parts(a, b, dtype)


def accumulated(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of 16-bit operands on CUDA, in float32."""
    return torch.mm(a, b, out_dtype=torch.float32)
