"""The torch.library operator: schema, fake kernels and autograd around the backends.

``forward`` and ``backward`` take the fields of a ``Problem`` in order, so that the schema is
written once, and hand them to the backend that was chosen for the call. They are registered as
``torch.library.custom_op`` would do it, without its wrappers, whose time a small batch would see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from supcon_kernels.backends import BACKENDS
from supcon_kernels.problem import Problem, statistics_dtype, working_dtype

_PROBLEM = (
    "Tensor rows, Tensor? cols, Tensor? row_labels, Tensor? col_labels, Tensor? weights, "
    "Tensor? temperature_tensor, float temperature, SymInt? self_offset, str summation, "
    "str denominator, bool normalize, int ignore_index, str backend"
)
_ROWS, _COLS, _TEMPERATURE, _NUM_TENSORS = 0, 1, 5, 6
_NUM_OPERANDS = 13  # of _PROBLEM
_LIBRARY: Any = torch.library.Library("supcon_kernels", "DEF")  # type: ignore[no-untyped-call]


def _define(schema: str) -> Any:
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    return getattr(torch.ops.supcon_kernels, schema.partition("(")[0]).default


forward = _define(
    f"forward({_PROBLEM}) -> (Tensor loss, Tensor total, Tensor counts, Tensor stats)"
)
backward = _define(
    "backward(Tensor grad_loss, Tensor stats, bool needs_rows, bool needs_cols, "
    f"bool needs_temperature, {_PROBLEM}, Tensor? col_grad_loss=None, Tensor? col_stats=None) "
    "-> (Tensor rows, Tensor cols, Tensor temperature)"
)


def _forward(*operands: Any) -> tuple[Tensor, ...]:
    """Loss (N,), total and counts as ``Problem.reduced`` has them, statistics (3, N) for ``backward``."""
    *fields, backend = operands
    result: tuple[Tensor, ...] = BACKENDS[backend].forward(Problem(*fields))
    return result


def _backward(
    grad_loss: Tensor,
    stats: Tensor,
    needs_rows: bool,
    needs_cols: bool,
    needs_temperature: bool,
    *operands: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows (N, D), cols (M, D) and the temperature (0-dim); (0,) where not needed.

    Where the columns' statistics (3, M) are given, as the forward of a problem with these columns as
    anchors has them, with the gradients (M,) of those anchors' losses, the rows' gradient is of
    those losses too, to which the rows are contrasts, and the temperature's is half of the sum of
    both. The columns' gradient is not needed then, and no column is a row itself.
    """
    *fields, backend = operands[:_NUM_OPERANDS]
    needs = (needs_rows, needs_cols, needs_temperature)
    grads: tuple[Tensor, Tensor, Tensor] = BACKENDS[backend].backward(
        Problem(*fields), grad_loss, stats, *needs, *operands[_NUM_OPERANDS:]
    )
    return grads


def _forward_fake(*operands: Any) -> tuple[Tensor, ...]:
    rows = operands[_ROWS]
    loss = rows.new_empty(rows.shape[0], dtype=working_dtype(rows))
    stats = rows.new_empty(3, rows.shape[0], dtype=statistics_dtype(rows))
    return loss, loss.new_empty(()), loss.new_empty(2), stats


def _backward_fake(
    grad_loss: Tensor,
    stats: Tensor,
    needs_rows: bool,
    needs_cols: bool,
    needs_temperature: bool,
    *operands: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = operands[_ROWS], operands[_COLS]
    return (
        rows.new_empty(rows.shape if needs_rows else (0,)),
        rows.new_empty(cols.shape if needs_cols else (0,)),
        grad_loss.new_empty(() if needs_temperature else (0,)),
    )


def _below_autograd(operator: Any, *operands: Any) -> tuple[Tensor, ...]:
    with torch._C._AutoDispatchBelowAutograd():
        result: tuple[Tensor, ...] = operator(*operands)
    return result


class _Differentiable(torch.autograd.Function):
    """``forward``, whose gradient is ``backward``."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> tuple[Tensor, ...]:
        loss, total, counts, stats = _below_autograd(forward, *operands)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(counts, stats)
        ctx.save_for_backward(stats, *operands[:_NUM_TENSORS])
        ctx.options = operands[_NUM_TENSORS:]
        return loss, total, counts, stats

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor | None, grad_total: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        result: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        stats, *tensors = ctx.saved_tensors
        if grad_total is not None:
            of_all = grad_total.expand(stats.shape[1])
            grad_loss = of_all if grad_loss is None else grad_loss + of_all
        if grad_loss is None:
            return tuple(result)
        wanted = [ctx.needs_input_grad[k] for k in (_ROWS, _COLS, _TEMPERATURE)]
        grads = backward(grad_loss, stats, *wanted, *tensors, *ctx.options)
        for index, want, grad in zip((_ROWS, _COLS, _TEMPERATURE), wanted, grads):
            if want:
                result[index] = grad.to(tensors[index]) if index == _TEMPERATURE else grad
        return tuple(result)


class _NotTwice(torch.autograd.Function):
    """``backward``, whose own gradient is refused."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> tuple[Tensor, ...]:
        return _below_autograd(backward, *operands)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "supcon_loss can be differentiated twice only with backend='reference': "
            "the other backends recompute their gradient and do not record it"
        )


def _register(
    operator: Any, kernel: Callable[..., Any], fake: Callable[..., Any], function: Any
) -> None:
    def autograd(*operands: Any) -> tuple[Tensor, ...]:
        wants_grad = any(isinstance(x, Tensor) and x.requires_grad for x in operands)
        if wants_grad and torch.is_grad_enabled():
            result: tuple[Tensor, ...] = function.apply(*operands)
            return result
        return _below_autograd(operator, *operands)

    _LIBRARY.impl(operator, kernel, "CompositeExplicitAutograd")
    _LIBRARY.impl(operator, autograd, "Autograd")
    torch.library.register_fake(operator, fake, lib=_LIBRARY)


_register(forward, _forward, _forward_fake, _Differentiable)
_register(backward, _backward, _backward_fake, _NotTwice)
