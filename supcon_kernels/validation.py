"""What a call may look like: every check of the public arguments, each with a message that names one.

A message says which argument, what came and what is accepted. Values are read on the CPU alone, and
not in a trace: elsewhere the host would wait for the device. What a check of values would have found
there makes the loss NaN instead.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from supcon_kernels.problem import DENOMINATORS, SUMMATIONS

CONTRAST_MODES = ("all", "one")
REDUCTIONS = ("mean", "positive_mean", "sum", "none")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Call(NamedTuple):
    """The arguments of ``supcon_loss`` that say what is computed. Before ``check`` they may be anything."""

    features: Any
    labels: Any
    mask: Any
    contrast_features: Any
    contrast_labels: Any
    self_offset: Any
    symmetric: Any
    temperature: Any
    base_temperature: Any
    contrast_mode: Any
    summation: Any
    denominator: Any
    normalize: Any
    reduction: Any
    ignore_index: Any


def check(call: Call) -> None:
    """Every argument is right.

    Raises:
        TypeError: features are no floating-point tensor.
        ValueError: any other argument is not as ``supcon_loss`` describes it.
    """
    _check_options(call)
    _check_features(call.features, call.contrast_features)
    _check_temperature(call.features, call.temperature, call.base_temperature)
    _check_targets(call)
    if call.symmetric:
        _check_both_ways(call)


def _check_options(call: Call) -> None:
    """Each option is of its type and one of the values that it knows."""
    ignore_index = call.ignore_index
    for name, value in (("normalize", call.normalize), ("symmetric", call.symmetric)):
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
    if (
        isinstance(ignore_index, bool)
        or not isinstance(ignore_index, int)
        or not -(2**63) <= ignore_index < 2**63
    ):
        raise ValueError(f"ignore_index must be a 64-bit integer, got {ignore_index!r}")
    for name, value, accepted in (
        ("contrast_mode", call.contrast_mode, CONTRAST_MODES),
        ("summation", call.summation, SUMMATIONS),
        ("denominator", call.denominator, DENOMINATORS),
        ("reduction", call.reduction, REDUCTIONS),
    ):
        if value not in accepted:
            raise ValueError(f"{name} must be one of {list(accepted)}, got {value!r}")


def _check_features(features: Any, contrast_features: Any) -> None:
    """Features (N, D) or (B, V, D), contrast features (M, D) of the same width and device."""
    for name, x in (("features", features), ("contrast_features", contrast_features)):
        if x is None and name == "contrast_features":
            continue
        if not isinstance(x, Tensor) or x.dtype not in FLOATS:
            raise TypeError(
                f"{name} must be a float16, bfloat16, float32 or float64 tensor, "
                f"got {_described(x)}"
            )
        _check_layout(name, x)
        if x.ndim != 2 and (name, x.ndim) != ("features", 3):
            shapes = "(N, D) or (B, V, D)" if name == "features" else "(M, D)"
            raise ValueError(f"{name} must have shape {shapes}, got {tuple(x.shape)}")
    if features.ndim == 3 and features.shape[1] == 0:
        raise ValueError(f"features must hold at least one view, got {tuple(features.shape)}")
    if contrast_features is None:
        return
    if contrast_features.shape[1] != features.shape[-1]:
        raise ValueError(
            "contrast_features must have as many columns as features have "
            f"({features.shape[-1]}), got shape {tuple(contrast_features.shape)}"
        )
    _check_device("contrast_features", contrast_features, features)


def _check_temperature(features: Tensor, temperature: Any, base_temperature: Any) -> None:
    """Positive temperatures; a learned one excludes the scale, under which it would fall to zero."""
    for name, value in (("temperature", temperature), ("base_temperature", base_temperature)):
        if value is None and name == "base_temperature":
            continue
        if isinstance(value, Tensor) and name == "temperature":
            _check_temperature_tensor(features, value)
        elif isinstance(value, bool) or not isinstance(value, (float, numbers.Real)):
            raise ValueError(f"{name} must be a number > 0, got {value!r}")
        elif not 0 < float(value) < float("inf"):
            raise ValueError(f"{name} must be > 0 and finite, got {value}")
    if (
        isinstance(temperature, Tensor)
        and temperature.requires_grad
        and base_temperature is not None
    ):
        raise ValueError(
            f"base_temperature must be None with a temperature that requires grad, got "
            f"{base_temperature}: scaled by temperature / base_temperature, descent drives it to 0"
        )


def _check_temperature_tensor(features: Tensor, temperature: Tensor) -> None:
    if temperature.ndim != 0 or temperature.dtype not in FLOATS:
        raise ValueError(
            "temperature must be a number or a 0-dim floating-point tensor, "
            f"got {_described(temperature)}"
        )
    if temperature.device.type != "cpu":
        _check_device("temperature", temperature, features)
    elif _readable(temperature) and not 0 < float(temperature.detach()) < float("inf"):
        raise ValueError(f"temperature must be > 0 and finite, got {float(temperature.detach())}")


def check_clip(image_features: Any, text_features: Any, logit_scale: Any, logit_bias: Any) -> None:
    """There are as many texts as images, of one width; the scale is positive, and there is no bias."""
    for name, x in (("image_features", image_features), ("text_features", text_features)):
        if not isinstance(x, Tensor) or x.dtype not in FLOATS or x.ndim != 2:
            raise ValueError(
                f"{name} must be a floating-point tensor of shape (N, D), got {_described(x)}"
            )
    if text_features.shape != image_features.shape:
        raise ValueError(
            f"text_features must have the shape of image_features {tuple(image_features.shape)}, "
            f"got {tuple(text_features.shape)}"
        )
    if logit_bias is not None:
        raise ValueError(
            f"logit_bias must be None, got {_described(logit_bias)}: it changes nothing in a softmax"
        )
    if isinstance(logit_scale, Tensor):
        if logit_scale.numel() != 1 or logit_scale.dtype not in FLOATS:
            raise ValueError(
                "logit_scale must be a number or a floating-point tensor of one element, "
                f"got {_described(logit_scale)}"
            )
        if not _readable(logit_scale):
            return
        logit_scale = float(logit_scale.detach())
    elif isinstance(logit_scale, bool) or not isinstance(logit_scale, (float, numbers.Real)):
        raise ValueError(f"logit_scale must be a number > 0, got {logit_scale!r}")
    if not 0 < float(logit_scale) < float("inf"):
        raise ValueError(f"logit_scale must be > 0 and finite, got {logit_scale}")


def _check_targets(call: Call) -> None:
    """What is positive: labels, a mask or neither, with or without other rows to contrast with."""
    features, labels, mask = call.features, call.labels, call.mask
    batch = features.shape[0]
    views = features.shape[1] if features.ndim == 3 else 1
    if labels is not None and mask is not None:
        raise ValueError("mask must be None where labels are given, got both")
    if labels is not None:
        _check_labels("labels", labels, batch, features)
    if call.contrast_features is None:
        for name in ("contrast_labels", "self_offset"):
            if (value := getattr(call, name)) is not None:
                raise ValueError(f"{name} must be None without contrast_features, got {value!r}")
        if labels is None and mask is None and views == 1:
            raise ValueError(
                "labels (or mask) must be given where features hold one view a sample, "
                f"got features of shape {tuple(features.shape)} and neither: nothing is positive"
            )
        shapes = [(batch, batch), (views * batch, views * batch)][: 1 if views == 1 else 2]
    else:
        _check_contrast(call)
        shapes = [(batch, call.contrast_features.shape[0])]
    if mask is not None:
        _check_mask(mask, shapes, features)


def _check_both_ways(call: Call) -> None:
    """What a symmetric call must be, given that one way is right."""
    features, contrast_features = call.features, call.contrast_features
    if contrast_features is None:
        raise ValueError("symmetric must be False without contrast_features, got True")
    if call.self_offset is not None:
        raise ValueError(f"self_offset must be None with symmetric=True, got {call.self_offset!r}")
    if call.reduction == "none":
        raise ValueError(
            "reduction must be 'mean', 'positive_mean' or 'sum' with symmetric=True, got 'none'"
        )
    unlabelled = call.labels is None and call.mask is None
    if unlabelled and contrast_features.shape[0] != features.shape[0]:
        raise ValueError(
            "contrast_features must have as many rows as there are anchors "
            f"({features.shape[0]}) with symmetric=True and no labels, row i being the positive of "
            f"anchor i, got {contrast_features.shape[0]}"
        )


def _check_contrast(call: Call) -> None:
    """Other rows to contrast with, their labels, and where the anchors are among them."""
    features, labels, mask = call.features, call.labels, call.mask
    contrast_labels, self_offset = call.contrast_labels, call.self_offset
    n, m = features.shape[0], call.contrast_features.shape[0]
    if mask is not None and contrast_labels is not None:
        raise ValueError("mask must be None where contrast_labels are given, got both")
    if mask is None and (labels is None) != (contrast_labels is None):
        missing = "labels" if labels is None else "contrast_labels"
        raise ValueError(f"{missing} must be given too: labels and contrast_labels come together")
    if contrast_labels is not None:
        _check_labels("contrast_labels", contrast_labels, m, features)
        if contrast_labels.ndim != labels.ndim or contrast_labels.shape[1:] != labels.shape[1:]:
            raise ValueError(
                f"contrast_labels must be of the kind of labels {tuple(labels.shape)}, "
                f"got {tuple(contrast_labels.shape)}"
            )
    unlabelled = labels is None and mask is None
    if unlabelled and m < n:
        raise ValueError(
            f"contrast_features must have at least as many rows as there are anchors ({n}) where "
            f"no labels are given, row i being the positive of anchor i, got {m}"
        )
    if self_offset is None:
        return
    if unlabelled:
        raise ValueError(f"self_offset must be None without labels or mask, got {self_offset!r}")
    if isinstance(self_offset, bool) or not isinstance(self_offset, (int, torch.SymInt)):
        raise ValueError(f"self_offset must be an int, got {self_offset!r}")
    if not 0 <= self_offset <= m - n:
        raise ValueError(
            f"self_offset must lie in [0, {m - n}] for {n} anchors and {m} contrast_features, "
            f"got {self_offset}"
        )


def _check_labels(name: str, labels: Any, length: int, features: Tensor) -> None:
    dtypes = {1: INTEGERS, 2: FLOATS}
    if (
        not isinstance(labels, Tensor)
        or labels.dtype not in dtypes.get(labels.ndim, ())
        or labels.shape[0] != length
        or (labels.ndim == 2 and labels.shape[1] < 2)
    ):
        raise ValueError(
            f"{name} must be a tensor of ({length},) integers or ({length}, C) floats, C > 1, "
            f"got {_described(labels)}{_conversion(name, labels)}"
        )
    _check_layout(name, labels)
    _check_no_grad(name, labels)
    _check_device(name, labels, features)
    if labels.ndim == 2 and _readable(labels) and not _in_range(labels, 0.0):
        raise ValueError(f"{name} must be >= 0 and finite where they are soft, got others")


def _conversion(name: str, labels: Any) -> str:
    """What the caller may have meant, where the dtype alone is wrong."""
    if not isinstance(labels, Tensor) or labels.is_complex():
        return ""
    is_vector = labels.ndim == 1 or (labels.ndim == 2 and labels.shape[1] == 1)
    if is_vector and labels.dtype not in INTEGERS:
        return f": if these are class numbers, pass {name}.long()"
    if labels.ndim == 2 and not labels.is_floating_point():
        return f": if these are one-hot or multi-hot, pass {name}.float()"
    return ""


def _check_mask(mask: Any, shapes: list[tuple[int, int]], features: Tensor) -> None:
    if not isinstance(mask, Tensor) or tuple(mask.shape) not in shapes:
        accepted = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"mask must be a tensor of shape {accepted}, got {_described(mask)}")
    if mask.dtype not in (torch.bool, *INTEGERS, *FLOATS):
        raise ValueError(f"mask must be boolean, integer or floating-point, got {mask.dtype}")
    _check_layout("mask", mask)
    _check_no_grad("mask", mask)
    _check_device("mask", mask, features)
    if mask.is_floating_point() and _readable(mask) and not _in_range(mask, -math.inf):
        raise ValueError("mask must be finite, got NaN or infinity")


def _in_range(x: Tensor, least: float) -> bool:
    """Whether all of ``x`` is finite and at least that, by one look at it."""
    if x.numel() == 0:
        return True
    lowest, highest = (float(end) for end in torch.aminmax(x))
    return least <= lowest and math.isfinite(lowest) and math.isfinite(highest)


def _described(value: Any) -> str:
    """What came, for a message. (Only then: a shape that is printed is fixed in a trace.)"""
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__


def _check_layout(name: str, x: Tensor) -> None:
    if x.layout != torch.strided:
        raise ValueError(f"{name} must be a strided tensor, got the layout {x.layout}")


def _check_no_grad(name: str, x: Tensor) -> None:
    if x.requires_grad:
        raise ValueError(f"{name} must not require grad, got a tensor that does: detach it")


def _check_device(name: str, x: Tensor, features: Tensor) -> None:
    if x.device != features.device:
        raise ValueError(
            f"{name} must be on the device of features ({features.device}), got {x.device}"
        )


def _readable(x: Tensor) -> bool:
    """Whether the host has the values without waiting for a device."""
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        return False
    # Under vmap a tensor has a value for each call.
    return x.device.type == "cpu" and not torch._C._functorch.is_functorch_wrapped_tensor(x)
