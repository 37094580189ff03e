"""The one comparison: a result against the float64 truth, measured by the error of the dense formula.

An error passes where it is at most twice that of the dense formula in the same dtype, plus a
floor for the case that the dense formula was lucky. The truth is the dense formula in float64
on the same rounded inputs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from supcon_kernels import supcon_loss
from supcon_kernels.backends import reference as dense
from supcon_kernels.problem import normalize

Loss = Callable[..., Tensor]
LEAVES = ("features", "contrast_features", "temperature")
# Roundings of the dtype by which a result may be off for no fault of its own.
FLOOR_ROUNDINGS = 4


def evaluate(
    loss_function: Loss, arguments: dict[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The loss and every gradient, in float64, of arguments rounded to ``dtype``."""
    arguments = dict(arguments)
    for name in LEAVES:
        if arguments.get(name) is not None:
            leaf = torch.as_tensor(arguments[name], dtype=torch.float64)
            leaf = leaf.to(dtype) if name != "temperature" else leaf
            arguments[name] = leaf.clone().requires_grad_()
    if arguments.get("base_temperature") is not None:
        arguments["temperature"] = float(arguments["temperature"].detach())
    leaves = {name: x for name in LEAVES if isinstance(x := arguments.get(name), Tensor)}
    loss = loss_function(**arguments)
    weight = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    grads = torch.autograd.grad((loss * weight).sum(), list(leaves.values()), allow_unused=True)
    result = {"loss": loss.detach().double()}
    for (name, leaf), grad in zip(leaves.items(), grads):
        result[name] = torch.zeros_like(leaf).double() if grad is None else grad.double()
    return result


def reference(**arguments: Any) -> Tensor:
    """The dense formula in the working dtype of its inputs."""
    return supcon_loss(**arguments, backend="reference")


def dense_in_short_products(*, fold: float = 1.0, **arguments: Any) -> Tensor:
    """The dense formula, accumulating in float32, with both factors of each product in 16 bits.

    Rows are rounded after their normalisation, and the derivatives by similarities, which the backward
    multiplies with rows. This is what 16-bit inputs may cost a kernel that multiplies in 16 bits.
    ``fold`` is what rows are multiplied by before they are rounded.
    """
    dtype = arguments["features"].dtype
    for name in ("features", "contrast_features"):
        if arguments.get(name) is not None:
            x = arguments[name]
            rows = x.float()
            if arguments.get("normalize", True):
                ignored = ~x.isfinite().all(dim=-1, keepdim=True)
                rows = normalize(rows.masked_fill(ignored, 0.0).flatten(0, -2)).view_as(rows)
                rows = torch.where(ignored, torch.nan, rows)
            rounded = (rows * fold).to(x.dtype).float() / fold
            arguments[name] = rows + (rounded - rows).detach()
    pair_loss = functools.partial(_pair_loss_in_short_products, dtype)
    with mock.patch.object(dense, "pair_loss", pair_loss):
        return reference(**{**arguments, "normalize": False})


_pair_loss = dense.pair_loss


def _pair_loss_in_short_products(dtype: torch.dtype, s: Tensor, *others: Any) -> Any:
    """The losses of anchors, whose derivatives by their similarities ``s`` are rounded to ``dtype``."""

    def rounded(derivatives: Tensor) -> Tensor:
        # Relative to the largest, so that float16 flushes none that counts.
        _, exponent = torch.frexp(derivatives.abs().amax())
        scaled = torch.ldexp(derivatives, -exponent)
        return torch.ldexp(scaled.to(dtype).to(s.dtype), exponent)

    if s.requires_grad and s.numel():
        s.register_hook(rounded)
    return _pair_loss(s, *others)


def assert_close(loss_function: Loss, arguments: dict[str, Any], dtype: torch.dtype) -> None:
    """Loss and gradients of ``loss_function`` are as near to the truth as the dense formula's.

    Args:
        loss_function: takes the arguments of ``supcon_loss``.
        arguments: as a case gives them, features in float64.
        dtype: what the features are rounded to.

    Raises:
        AssertionError: names the quantity, its error and the bound.
    """
    for name, error, bound in deviations(loss_function, arguments, dtype):
        assert bound < float("inf"), f"{name}: the bound is {bound}"
        assert error <= bound, f"{name}: error {error:.3g} exceeds {bound:.3g} in {dtype}"


def deviations(
    loss_function: Loss, arguments: dict[str, Any], dtype: torch.dtype
) -> Iterator[tuple[str, float, float]]:
    """(quantity, error, bound) of the loss and of each gradient that has elements; as above."""
    rounded = dict(arguments)
    for name in ("features", "contrast_features"):
        if arguments.get(name) is not None:
            rounded[name] = arguments[name].to(dtype).double()
    truth = evaluate(reference, rounded, torch.float64)
    dense = [evaluate(plain, rounded, dtype) for plain in _dense_formulas(arguments, dtype)]
    result = evaluate(loss_function, rounded, dtype)

    for name, exact in truth.items():
        got = result[name]
        assert got.shape == exact.shape, f"{name}: shape {got.shape}, expected {exact.shape}"
        if exact.numel() == 0:
            continue
        scale = _row_scale(name, rounded)
        error = ((got - exact) * scale).abs().max().item()
        dense_error = max(((plain[name] - exact) * scale).abs().max().item() for plain in dense)
        yield name, error, 2 * dense_error + _floor(name, exact * scale, rounded, dtype)


def _dense_formulas(arguments: dict[str, Any], dtype: torch.dtype) -> list[Loss]:
    """What a result is measured by; the largest of their errors counts.

    In 16 bits a kernel may round unit rows, or rows that carry the temperature: the errors are
    of one size, but as different as two draws, and the error of a single number may be lucky.
    """
    if dtype.itemsize != 2:
        return [reference]
    if not arguments.get("normalize", True):
        return [dense_in_short_products]  # rows are multiplied as they are given
    fold = (math.log2(math.e) / float(arguments["temperature"])) ** 0.5
    folded = functools.partial(dense_in_short_products, fold=fold)
    return [dense_in_short_products, folded]


def _row_scale(name: str, arguments: dict[str, Any]) -> Tensor | float:
    """Gradients of rows count relative to 1 / norm: that is how they grow where rows are normalised."""
    if name not in ("features", "contrast_features") or not arguments.get("normalize", True):
        return 1.0
    norm = arguments[name].double().norm(dim=-1, keepdim=True)
    return norm.nan_to_num(1.0, 1.0, 1.0)


def _floor(name: str, exact: Tensor, arguments: dict[str, Any], dtype: torch.dtype) -> float:
    """What roundings alone may cost: of exponents, and of outputs in 16 bits.

    A quantity may be tiny because its terms cancel, so its size is at least that of one term: of
    a similarity for the loss, of one anchor's share of the mean for a gradient.
    """
    tau = float(arguments["temperature"])
    num_anchors = max(arguments["features"].shape[:-1].numel(), 1)
    reach = 1.0 / tau  # the largest similarity
    if not arguments.get("normalize", True):
        other = arguments.get("contrast_features")
        for x in (arguments["features"], arguments["features"] if other is None else other):
            reach *= x[x.isfinite().all(dim=-1)].norm(dim=-1).amax().item() if x.numel() else 1.0
    similarity = reach
    labels = arguments.get("labels")
    if arguments.get("summation") == "in" and labels is not None and labels.is_floating_point():
        weights = labels.double() @ labels.double().T  # their logarithms are part of exponents
        logarithms = weights[weights > 0].log().abs()
        reach = max(reach, logarithms.max().item() if logarithms.numel() else 0.0)
    term = {"loss": 1.0, "temperature": similarity}.get(name, 1.0 / num_anchors)
    size = exact.abs().max().item()
    working = torch.float64 if dtype == torch.float64 else torch.float32
    floor = FLOOR_ROUNDINGS * torch.finfo(working).eps * (size + term) * max(1.0, reach)
    if dtype != working and name in ("features", "contrast_features"):
        floor += torch.finfo(dtype).eps * size
    if dtype != working and name == "temperature":
        # It may be the rows' product with gradients made of 16-bit factors, which cancel.
        floor += torch.finfo(dtype).eps * (size + term)
    return floor
