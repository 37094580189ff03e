"""The torch.library operator: schema, fake kernels and autograd around the backends.

``forward`` and ``backward`` take the fields of a ``Problem`` in order, so that the schema is
written once, and hand them to the backend that was chosen for the call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from supcon_kernels.backends import BACKENDS
from supcon_kernels.problem import Problem, working_dtype

_PROBLEM = (
    "Tensor rows, Tensor? cols, Tensor? row_labels, Tensor? col_labels, Tensor? weights, "
    "Tensor? temperature_tensor, float temperature, SymInt? self_offset, str summation, "
    "str denominator, bool normalize, int ignore_index, str backend"
)
_ROWS, _COLS, _TEMPERATURE, _NUM_TENSORS = 0, 1, 5, 6


@torch.library.custom_op(
    "supcon_kernels::forward",
    mutates_args=(),
    schema=f"({_PROBLEM}) -> (Tensor loss, Tensor contributes, Tensor stats)",
)
def forward(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (N,), whether each anchor contributes (N,) bool, and O(N) statistics for ``backward``."""
    *fields, backend = operands
    problem = Problem(*fields)
    with torch.autocast(problem.rows.device.type, enabled=False):
        result: tuple[Tensor, Tensor, Tensor] = BACKENDS[backend].forward(problem)
    return result


@forward.register_fake
def _forward_fake(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = operands[_ROWS]
    loss = rows.new_empty(rows.shape[0], dtype=working_dtype(rows))
    return loss, torch.empty_like(loss, dtype=torch.bool), loss.new_empty(3, rows.shape[0])


@torch.library.custom_op(
    "supcon_kernels::backward",
    mutates_args=(),
    schema="(Tensor grad_loss, Tensor stats, bool needs_rows, bool needs_cols, "
    f"bool needs_temperature, {_PROBLEM}) -> (Tensor rows, Tensor cols, Tensor temperature)",
)
def backward(
    grad_loss: Tensor,
    stats: Tensor,
    needs_rows: bool,
    needs_cols: bool,
    needs_temperature: bool,
    *operands: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows (N, D), cols (M, D) and the temperature (0-dim); (0,) where not needed."""
    *fields, backend = operands
    problem = Problem(*fields)
    needs = (needs_rows, needs_cols, needs_temperature)
    # An anchor that does not contribute has no gradient, whatever comes from above.
    grad_loss = torch.where(stats[1] == torch.inf, 0.0, grad_loss)
    with torch.autocast(problem.rows.device.type, enabled=False):
        grads: tuple[Tensor, Tensor, Tensor] = BACKENDS[backend].backward(
            problem, grad_loss, stats, *needs
        )
    return grads


@backward.register_fake
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
        stats.new_empty(() if needs_temperature else (0,)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[2], *inputs[:_NUM_TENSORS])
    ctx.options = inputs[_NUM_TENSORS:]


def _differentiate(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    stats, *tensors = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[k] for k in (_ROWS, _COLS, _TEMPERATURE)]
    grads = backward(grad_loss, stats, *wanted, *tensors, *ctx.options)
    result: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for index, want, grad in zip((_ROWS, _COLS, _TEMPERATURE), wanted, grads):
        if want:
            result[index] = grad
    if wanted[2]:
        result[_TEMPERATURE] = grads[2].to(tensors[_TEMPERATURE])
    return tuple(result)


def _refuse(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    raise RuntimeError(
        "supcon_loss can be differentiated twice only with backend='reference': "
        "the other backends recompute their gradient and do not record it"
    )


forward.register_autograd(_differentiate, setup_context=_save)
backward.register_autograd(_refuse)
