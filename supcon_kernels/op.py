"""The torch.library operator: schema, fake kernels and autograd around the backends.

``forward`` and ``backward`` take the fields of a ``Problem`` in order, so that the schema is
written once, and hand them to the backend that was chosen for the call. They are registered as
``torch.library.custom_op`` would do it, without its wrappers, whose time a small batch would see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from supcon_kernels.backends import BACKENDS, native, triton
from supcon_kernels.problem import Problem, as_asked, mean_of_ways, statistics_dtype, working_dtype

_PROBLEM = (
    "Tensor rows, Tensor? cols, Tensor? row_labels, Tensor? col_labels, Tensor? weights, "
    "Tensor? temperature_tensor, float temperature, SymInt? self_offset, str summation, "
    "str denominator, bool normalize, int ignore_index, bool tf32, bool symmetric, str reduction, "
    "str backend"
)
_ROWS, _COLS, _TEMPERATURE, _NUM_TENSORS = 0, 1, 5, 6
_DIFFERENTIABLE = (_ROWS, _COLS, _TEMPERATURE)
_NUM_OPERANDS = 16  # of _PROBLEM
_PLAIN = (Tensor, torch.nn.Parameter)
_LIBRARY: Any = torch.library.Library("supcon_kernels", "DEF")


def _define(schema: str) -> Any:
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    return getattr(torch.ops.supcon_kernels, schema.partition("(")[0]).default


forward = _define(
    f"forward({_PROBLEM}) -> (Tensor loss, Tensor count, Tensor stats, Tensor prepared)"
)
backward = _define(
    "backward(Tensor grad_loss, Tensor count, Tensor stats, Tensor? prepared, bool needs_rows, "
    f"bool needs_cols, bool needs_temperature, {_PROBLEM}, Tensor? col_grad_loss=None, "
    "Tensor? col_stats=None) -> (Tensor rows, Tensor cols, Tensor temperature)"
)


def _forward(*operands: Any) -> tuple[Tensor, ...]:
    """The loss and what ``backward`` takes of it.

    Returns:
        loss: 0-dim, or (N,) where the reduction is "none".
        count: 0-dim, what the sum of the anchors' losses was divided by, at least 1; (2,) where
            symmetric, of the rows' sum and of the columns'.
        stats: (k, N) what is known of each anchor; the second is infinite where it does not
            contribute. Where symmetric (k, N + M): the columns come after the rows.
        prepared: what the backend makes of the features, or nothing.
    """
    *fields, reduction, backend = operands
    problem = Problem(*fields)
    of_ways: list[tuple[Tensor, ...]]
    if backend == "triton":
        of_ways = [triton.forward(way, reduction) for way in problem.ways()]
    elif problem.symmetric:
        both = BACKENDS[backend].forward_both_ways(problem)
        of_ways = [_results(of_way, reduction) for of_way in both]
    else:
        of_ways = [_results(BACKENDS[backend].forward(problem.by_rows()), reduction)]
    if not problem.symmetric:
        return of_ways[0]
    losses, counts, stats, prepared = zip(*of_ways)
    return mean_of_ways(losses), torch.stack(counts) * 2, torch.cat(stats, dim=1), prepared[0]


def _results(of_backend: tuple[Tensor, ...], reduction: str) -> tuple[Tensor, ...]:
    loss, total, counts, stats = of_backend
    asked, count = as_asked(loss, total, counts, reduction)
    count = loss.new_ones(()) if count is None else count
    return asked, count, stats, loss.new_empty(0)


def _forward_for(
    wanted: Sequence[bool], *operands: Any
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What ``forward`` returns, and the gradients ``wanted`` where they are better made at once.

    They are of an upstream gradient of 1; no tensor where ``backward`` makes them.
    """
    *fields, reduction, backend = operands
    problem = Problem(*fields)
    if backend != "native" or not native.makes_gradients(problem, reduction):
        return _forward(*operands), ()
    losses, grads = native.forward_and_backward(problem.by_rows(), reduction, wanted)
    return _results(losses, reduction), _poisoned(problem, grads)


def _poisoned(
    problem: Problem, grads: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    if problem.has_integer_labels:
        return grads
    poison = problem.target_poison()
    return grads[0] + poison, grads[1] + poison, grads[2] + poison


def _scaled(
    grad_loss: Tensor, grads: Sequence[Tensor], inputs: Sequence[Any], wanted: Sequence[bool]
) -> list[Tensor]:
    """The gradients of the ``inputs`` that are wanted, given those of an upstream gradient of 1."""
    return [
        _as_given((grad * grad_loss).to(x.dtype), x) if want else grad
        for grad, x, want in zip(grads, inputs, wanted)
    ]


def _backward(
    grad_loss: Tensor,
    count: Tensor,
    stats: Tensor,
    prepared: Tensor | None,
    needs_rows: bool,
    needs_cols: bool,
    needs_temperature: bool,
    *operands: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows (N, D), cols (M, D) and the temperature (0-dim); (0,) where not needed.

    Where the columns' statistics (k, M) are given, as the forward of a problem with these columns as
    anchors has them, with the gradient of those anchors' losses, the rows' gradient is of
    those losses too, to which the rows are contrasts, and the temperature's is half of the sum of
    both. The columns' gradient is not needed then, and no column is a row itself.
    """
    *fields, reduction, backend = operands[:_NUM_OPERANDS]
    problem, of_cols = Problem(*fields), operands[_NUM_OPERANDS:]
    needs = (needs_rows, needs_cols, needs_temperature)
    if problem.symmetric:
        return _backward_both_ways(problem, grad_loss / count, stats, prepared, needs, backend)
    if backend == "triton":
        return triton.backward(problem, grad_loss, count, stats, prepared, *needs, *of_cols)
    if reduction != "none":
        weight = grad_loss if reduction == "sum" else grad_loss / count
        grad_loss = weight.expand(stats.shape[1])
        if of_cols and of_cols[1] is not None:
            of_cols = (weight.expand(of_cols[1].shape[1]), of_cols[1])
    grads = BACKENDS[backend].backward(problem.by_rows(), grad_loss, stats, *needs, *of_cols)
    grads = _poisoned(problem, grads)
    return (
        _as_given(grads[0], problem.rows) if needs_rows else grads[0],
        _as_given(grads[1], problem.cols) if needs_cols else grads[1],
        grads[2],
    )


def _backward_both_ways(
    problem: Problem,
    weights: Tensor,
    stats: Tensor,
    prepared: Tensor | None,
    needs: tuple[bool, bool, bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``_backward`` of a symmetric problem, whose rows' and columns' losses have ``weights`` (2,)."""
    n, m = problem.num_rows, problem.num_cols
    of_rows, of_cols = weights.unbind()
    row_stats, col_stats = stats.split((n, m), dim=1)
    if backend == "triton":
        saved = (weights.new_ones(()), row_stats, prepared)
        return triton.backward(problem, of_rows, *saved, *needs, of_cols, col_stats)
    of_backend = BACKENDS[backend].backward
    call = (of_rows.expand(n), row_stats, *needs, of_cols.expand(m), col_stats)
    return _poisoned(problem, of_backend(problem, *call))


def _as_given(gradient: Tensor, features: Tensor | None) -> Tensor:
    """The gradient (N, D) in the shape of the features."""
    if features is None or features.ndim != 3:
        return gradient
    batch, views, dim = features.shape
    return gradient.view(views, batch, dim).transpose(0, 1).contiguous()


def _forward_fake(*operands: Any) -> tuple[Tensor, ...]:
    *fields, reduction, backend = operands
    problem = Problem(*fields)
    n, rows = problem.num_rows, problem.rows
    loss = rows.new_empty((n,) if reduction == "none" else (), dtype=working_dtype(rows))
    count = loss.new_empty((2,) if problem.symmetric else ())
    if backend == "triton":
        stats, prepared = triton.empty_saved(problem)
    else:
        stats = rows.new_empty(3, n, dtype=statistics_dtype(rows))
        prepared = loss.new_empty(0)
    if problem.symmetric:
        stats = stats.new_empty(stats.shape[0], n + problem.num_cols)
    return loss, count, stats, prepared


def _backward_fake(
    grad_loss: Tensor,
    count: Tensor,
    stats: Tensor,
    prepared: Tensor | None,
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


def loss_of(*operands: Any) -> Tensor:
    """The loss of ``forward``; by its autograd function where the dispatcher would only lead there."""
    tensors = operands[:_NUM_TENSORS]
    if not torch.compiler.is_compiling() and _wants_gradient(tensors) and _is_plain(tensors):
        loss: Tensor = SupConLossFunction.apply(*operands)[0]
    else:
        loss = forward(*operands)[0]
    return loss


def _below_autograd(operator: Any, *operands: Any) -> tuple[Tensor, ...]:
    with torch._C._AutoDispatchBelowAutograd():
        if _is_plain(operands):
            return _KERNELS[operator](*operands)
        result: tuple[Tensor, ...] = operator(*operands)
    return result


def _is_plain(operands: Sequence[Any]) -> bool:
    """Whether the dispatcher would lead to the kernel: no mode, transform, subclass or meta tensor."""
    if torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.Python):
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    for x in operands:
        if isinstance(x, Tensor) and (type(x) not in _PLAIN or x.is_meta):
            return False
    return True


class SupConLossFunction(torch.autograd.Function):
    """``forward``, whose gradient is ``backward``. Profilers show a training step's call by this name."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> tuple[Tensor, ...]:
        """As the operator; gradients that are better made at once are saved beside the statistics."""
        grads: tuple[Tensor, ...] = ()
        if _is_plain(operands[:_NUM_TENSORS]):
            with torch._C._AutoDispatchBelowAutograd():
                wanted = [ctx.needs_input_grad[k] for k in _DIFFERENTIABLE]
                (loss, *saved), grads = _forward_for(wanted, *operands)
        else:
            loss, *saved = _below_autograd(forward, *operands)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*saved)
        ctx.save_for_backward(*grads, *saved, *operands[:_NUM_TENSORS])
        ctx.num_made = len(grads)
        ctx.options = operands[_NUM_TENSORS:]
        return loss, *saved

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """One gradient for each operand, None where it has none."""
        result: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if grad_loss is None:
            return tuple(result)
        unpacked = ctx.saved_tensors  # once: activation checkpointing refuses a second time
        saved, tensors = unpacked[:-_NUM_TENSORS], unpacked[-_NUM_TENSORS:]
        made, saved = saved[: ctx.num_made], saved[ctx.num_made :]
        wanted = [ctx.needs_input_grad[k] for k in _DIFFERENTIABLE]
        call = (grad_loss, *saved, *wanted, *tensors, *ctx.options)
        # A graph of the gradient is made, and refused, by the operator.
        if torch.is_grad_enabled() or not _is_plain((grad_loss, *tensors)):
            grads = backward(*call)
        elif made:
            grads = _scaled(grad_loss, made, [tensors[k] for k in _DIFFERENTIABLE], wanted)
        else:
            grads = _backward(*call)
        for index, want, grad in zip(_DIFFERENTIABLE, wanted, grads):
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
            "the other backends do not record how their gradient is made"
        )


def _wants_gradient(operands: Sequence[Any]) -> bool:
    if torch.is_grad_enabled():
        for x in operands:
            if isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


def _register(
    operator: Any, kernel: Callable[..., Any], fake: Callable[..., Any], function: Any
) -> None:
    def autograd(*operands: Any) -> tuple[Tensor, ...]:
        if _wants_gradient(operands):
            result: tuple[Tensor, ...] = function.apply(*operands)
            return result
        return _below_autograd(operator, *operands)

    _LIBRARY.impl(operator, kernel, "CompositeExplicitAutograd")
    _LIBRARY.impl(operator, autograd, "Autograd")
    torch.library.register_fake(operator, fake, lib=_LIBRARY)


_KERNELS = {forward: _forward, backward: _backward}
_register(forward, _forward, _forward_fake, SupConLossFunction)
_register(backward, _backward, _backward_fake, _NotTwice)
