"""The torch.library operator: schema, fake kernels and autograd around the backends.

``forward`` and ``backward`` take the fields of a ``Problem`` in order, so that the schema is
written once, and hand them to the backend that was chosen for the call. They are registered as
``torch.library.custom_op`` would do it, without its wrappers, whose time a small batch would see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from supcon_kernels.backends import FUSED, native
from supcon_kernels.backends.protocol import Anchors, Gradients, Made, Results, Wanted
from supcon_kernels.problem import (
    DIFFERENTIABLE,
    NUM_FIELDS,
    NUM_TENSORS,
    SCHEMA,
    Problem,
    working_dtype,
)

_PLAIN = (Tensor, torch.nn.Parameter)
_LIBRARY: Any = torch.library.Library("supcon_kernels", "DEF")


def define(schema: str) -> Any:
    """An operator of this library, without anything that runs it yet."""
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    return getattr(torch.ops.supcon_kernels, schema.partition("(")[0]).default


forward = define(
    f"forward({SCHEMA}, str backend, str reduction) "
    "-> (Tensor loss, Tensor divisor, Tensor stats, Tensor prepared)"
)
backward = define(
    "backward(Tensor grad_loss, Tensor divisor, Tensor stats, Tensor? prepared, bool needs_rows, "
    f"bool needs_cols, bool needs_temperature, {SCHEMA}, str backend, Tensor? col_grad_loss=None, "
    "Tensor? col_stats=None, bool unrounded=False) -> (Tensor rows, Tensor cols, Tensor temperature)"
)


class _Options(NamedTuple):
    """What ``backward`` is told behind the problem."""

    backend: str
    col_grad_loss: Tensor | None = None
    col_stats: Tensor | None = None
    unrounded: bool = False


def loss_of(problem: Problem, backend: str, reduction: str) -> Tensor:
    """The loss; by its autograd function where the dispatcher would only lead there."""
    operands = (*problem.operands(), backend, reduction)
    tensors = operands[:NUM_TENSORS]
    if torch.compiler.is_compiling() or not (_wants_gradient(tensors) and _is_plain(tensors)):
        loss: Tensor = forward(*operands)[0]
    elif backend == "native" and native.makes_gradients(problem, reduction):
        leaves = [operands[k] for k in DIFFERENTIABLE]
        loss = SupConLossWithGradients.apply(*leaves, problem, operands)
    else:
        loss = SupConLossFunction.apply(*operands)[0]
    return loss


def results_of(problem: Problem, backend: str, reduction: str) -> Results:
    """What the backend's forward gives, by the dispatcher."""
    return Results(*forward(*problem.operands(), backend, reduction))


def gradients_of(
    problem: Problem,
    anchors: Anchors,
    col_anchors: Anchors | None,
    wanted: Wanted,
    backend: str,
) -> Gradients:
    """What the backend's backward gives, by the dispatcher."""
    of_cols = (None, None) if col_anchors is None else (col_anchors.grad_loss, col_anchors.stats)
    *needs, unrounded = wanted
    options = (backend, *of_cols, unrounded)
    return Gradients(*backward(*anchors, *needs, *problem.operands(), *options))


def _forward(*operands: Any) -> tuple[Tensor, ...]:
    """``Results``."""
    *fields, backend, reduction = operands
    return FUSED[backend].forward(Problem(*fields), reduction)


def _backward(
    grad_loss: Tensor,
    divisor: Tensor,
    stats: Tensor,
    prepared: Tensor | None,
    needs_rows: bool,
    needs_cols: bool,
    needs_temperature: bool,
    *operands: Any,
) -> tuple[Tensor, ...]:
    """``Gradients``, of ``Anchors`` and ``Wanted`` in their order.

    The columns are anchors, too, where theirs are given beside the problem and the backend, or
    where the problem is symmetric.
    """
    problem = Problem(*operands[:NUM_FIELDS])
    options = _Options(*operands[NUM_FIELDS:])
    if problem.symmetric:
        grad_loss, col_grad_loss = (grad_loss / divisor).unbind()
        divisor = divisor.new_ones(())
        stats, col_stats = stats.split((problem.num_rows, problem.num_cols), dim=1)
        options = options._replace(col_grad_loss=col_grad_loss, col_stats=col_stats)
    anchors, col_anchors = Anchors(grad_loss, divisor, stats, prepared), None
    if options.col_grad_loss is not None and options.col_stats is not None:
        col_anchors = Anchors(options.col_grad_loss, divisor, options.col_stats)
    wanted = Wanted(needs_rows, needs_cols, needs_temperature, options.unrounded)
    made = FUSED[options.backend].backward(problem, anchors, col_anchors, wanted)
    grads = _poisoned(problem, made)
    return tuple([problem.rows.new_empty(0) if grad is None else grad for grad in grads])


def _poisoned(problem: Problem, made: Made) -> Made:
    """NaN where the targets are no weights: nobody has looked at them."""
    if problem.has_integer_labels:
        return made
    poison = problem.target_poison()
    return Made(*[None if grad is None else grad + poison for grad in made])


def _forward_fake(*operands: Any) -> tuple[Tensor, ...]:
    *fields, backend, reduction = operands
    problem = Problem(*fields)
    n, rows = problem.num_rows, problem.rows
    loss = rows.new_empty((n,) if reduction == "none" else (), dtype=working_dtype(rows))
    stats, prepared = FUSED[backend].saved(problem)
    if problem.symmetric:
        stats = stats.new_empty(stats.shape[0], n + problem.num_cols)
    return loss, loss.new_empty((2,) if problem.symmetric else ()), stats, prepared


def _backward_fake(
    grad_loss: Tensor,
    divisor: Tensor,
    stats: Tensor,
    prepared: Tensor | None,
    needs_rows: bool,
    needs_cols: bool,
    needs_temperature: bool,
    *operands: Any,
) -> tuple[Tensor, ...]:
    problem, options = Problem(*operands[:NUM_FIELDS]), _Options(*operands[NUM_FIELDS:])
    rows, cols = problem.rows, problem.rows if problem.cols is None else problem.cols
    dtype = problem.dtype if options.unrounded else rows.dtype
    return (
        rows.new_empty(rows.shape if needs_rows else (0,), dtype=dtype),
        rows.new_empty(cols.shape if needs_cols else (0,), dtype=dtype),
        grad_loss.new_empty(() if needs_temperature else (0,)),
    )


def _below_autograd(operator: Any, *operands: Any) -> tuple[Tensor, ...]:
    with torch._C._AutoDispatchBelowAutograd():
        if operator in _KERNELS and _is_plain(operands):
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
    """``forward``, whose gradient is ``backward``.

    Profilers show a training step's call by this name, or by that of ``SupConLossWithGradients``.
    """

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> tuple[Tensor, ...]:
        """As the operator."""
        loss, *saved = _below_autograd(forward, *operands)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*saved)
        ctx.save_for_backward(*saved, *operands[:NUM_TENSORS])
        ctx.options = operands[NUM_TENSORS:-1]
        return loss, *saved

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """One gradient for each operand, None where it has none."""
        if grad_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        unpacked = ctx.saved_tensors  # once: activation checkpointing refuses a second time
        saved, tensors = unpacked[:-NUM_TENSORS], unpacked[-NUM_TENSORS:]
        call = (grad_loss, *saved, *needs_of(ctx), *tensors, *ctx.options)
        # A graph of the gradient is made, and refused, by the operator.
        by_operator = torch.is_grad_enabled() or not _is_plain((grad_loss, *tensors))
        by_operator = by_operator or _is_batched(grad_loss)
        grads = backward(*call) if by_operator else _backward(*call)
        return by_operand(ctx, grads, tensors)


class SupConLossWithGradients(torch.autograd.Function):
    """The loss of few pairs, whose gradients are made with it.

    The backward gives them away, scaled. A second one makes them again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        cols: Tensor | None,
        temperature: Tensor | None,
        problem: Problem,
        operands: Sequence[Any],
    ) -> Tensor:
        """The loss of the problem, whose leaves come before it and the operator's operands behind it."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands[:NUM_TENSORS])
        ctx.options = operands[NUM_TENSORS:NUM_FIELDS]
        ctx.reduction = operands[-1]
        loss, ctx.made = _loss_and_gradients(ctx, problem)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients times that of the loss."""
        if grad_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[:3]
        if (
            torch.is_grad_enabled()
            or not _is_plain((grad_loss, *tensors))
            or _is_batched(grad_loss)
        ):
            # A graph of the gradient is made, and refused, by the operator.
            with torch.no_grad():
                _, *saved = forward(*tensors, *ctx.options, "native", ctx.reduction)
            grads = backward(grad_loss, *saved, *needs, *tensors, *ctx.options, "native")
        else:
            grads, ctx.made = ctx.made, None
            if grads is None:
                grads = _loss_and_gradients(ctx, Problem(*tensors, *ctx.options))[1]
            if float(grad_loss) != 1.0:
                grads = [None if grad is None else grad * grad_loss for grad in grads]
        leaves = [tensors[k] for k in DIFFERENTIABLE]
        given = [grad.to(leaf) if want else None for grad, leaf, want in zip(grads, leaves, needs)]
        return *given, None, None


def _is_batched(grad_loss: Tensor) -> bool:
    """Whether ``is_grads_batched=True`` gave it, so that it has no value of its own."""
    keys, of_devices = torch._C._dispatch_keys(grad_loss), torch._C.DispatchKey
    return not (keys.has(of_devices.CPU) or keys.has(of_devices.CUDA))


def _loss_and_gradients(ctx: Any, problem: Problem) -> tuple[Tensor, Made]:
    with torch._C._AutoDispatchBelowAutograd():
        wanted = Wanted(*ctx.needs_input_grad[:3])
        loss, made = native.loss_and_gradients(problem, ctx.reduction, wanted)
        return loss, _poisoned(problem, made)


def needs_of(ctx: Any) -> list[bool]:
    """Which gradients are wanted of a function whose first arguments are the operands of a problem."""
    return [ctx.needs_input_grad[k] for k in DIFFERENTIABLE]


def by_operand(
    ctx: Any, grads: Sequence[Tensor], operands: Sequence[Any]
) -> tuple[Tensor | None, ...]:
    """One gradient for each argument of such a function, None where none is wanted."""
    needs = ctx.needs_input_grad
    result: list[Tensor | None] = [None] * len(needs)
    for index, grad in zip(DIFFERENTIABLE, grads):
        if needs[index]:
            result[index] = grad.to(operands[index])
    return tuple(result)


class _NotTwice(torch.autograd.Function):
    """``backward``, whose own gradient is refused."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> tuple[Tensor, ...]:
        return _below_autograd(backward, *operands)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()


def refuse_second_derivative() -> NoReturn:
    """What the gradient of a gradient comes to."""
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


def register(
    operator: Any, kernel: Callable[..., Any], fake: Callable[..., Any], function: Any
) -> None:
    """Run an operator by ``kernel``, in a trace by ``fake``, and differentiate it by ``function``, if any."""

    def autograd(*operands: Any) -> tuple[Tensor, ...]:
        if function is not None and _wants_gradient(operands):
            result: tuple[Tensor, ...] = function.apply(*operands)
            return result
        return _below_autograd(operator, *operands)

    _LIBRARY.impl(operator, kernel, "CompositeExplicitAutograd")
    _LIBRARY.impl(operator, autograd, "Autograd")
    torch.library.register_fake(operator, fake, lib=_LIBRARY)


_KERNELS = {forward: _forward, backward: _backward}
register(forward, _forward, _forward_fake, SupConLossFunction)
register(backward, _backward, _backward_fake, _NotTwice)
