"""Batches that no memory holds: the gradient of a loss over all rows, through a network chunk by chunk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def grad_cache_backward(
    encode: Callable[[Any], Tensor],
    chunks: Sequence[Any],
    loss_function: Callable[[Tensor], Tensor],
    *,
    model: nn.Module | None = None,
    scale: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``loss_function(torch.cat([encode(chunk) for chunk in chunks])).backward()`` in a chunk's memory.

    A contrastive loss needs all embeddings at once, but not what the network keeps for its backward.
    So the chunks are encoded without a graph; the loss of all embeddings and its gradient by each of
    them are computed; and each chunk is encoded again, with its graph, to pass its part of that
    gradient on. The network runs forward twice; its activations are those of one chunk.

    The second time draws the same random numbers (of the CPU and of the current CUDA device) and
    begins with the same buffers. So the gradients are those of the line above to the bit, but for
    the order in which chunks add to a parameter's gradient; and those of the whole batch encoded at
    once, to rounding, where rows do not see each other in the network. With batch norm they do: each
    chunk is a statistics group of its own, and updates the running statistics once.

    Under DistributedDataParallel the network's gradients are averaged once, in the last chunk's
    backward; those of the loss's own parameters, such as a temperature, are not: average them by
    hand, and keep them out of the network. The running statistics are those of the first process,
    as DDP has it. Every process needs at least one chunk; and as many as the others, where the network itself talks to
    them, as SyncBatchNorm does. With ``supcon_loss(..., group=...)`` the rows are those of all
    processes.

    Args:
        encode: a chunk to its embeddings (n, D): a module or any function. ``torch.autocast`` belongs
            inside it.
        chunks: inputs of ``encode``, such as ``images.split(64)``; at least one. Views are rows like
            any others: ``loss_function`` may reshape.
        loss_function: all embeddings (N, D), in the order of the chunks, to a 0-dim loss. Parameters
            of its own, such as a temperature, get their gradients, too.
        model: the module behind ``encode``, where that is a function: its buffers are kept from
            counting twice, and its gradients from being averaged for each chunk.
        scale: applied to the loss before its backward: ``GradScaler.scale``.

    Returns:
        The loss, 0-dim, detached and not scaled. Gradients are added to ``.grad``, as by
        ``Tensor.backward``.

    Raises:
        TypeError: chunks that can be gone through only once; embeddings that are no tensor.
        ValueError: no chunk.

    Example:
        >>> loss = grad_cache_backward(
        ...     model, images.split(64), lambda rows: supcon_loss(rows, labels, temperature=0.1)
        ... )
        >>> optimizer.step()

    Source:
        Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup,
        RepL4NLP 2021, arXiv 2101.06983.
    """
    if not isinstance(chunks, Sequence):
        raise TypeError(f"chunks must be a sequence, as they are encoded twice, got {type(chunks)}")
    if not chunks:
        raise ValueError("chunks must hold at least one chunk")
    if model is None and isinstance(encode, nn.Module):
        model = encode

    states, parts = [], []
    with torch.no_grad(), _buffers_restored(model):
        for chunk in chunks:
            states.append(_random_state())
            parts.append(_checked(encode(chunk)))
    # Autocast of older torch, around this call, would go on with casts of weights without a graph.
    torch.clear_autocast_cache()

    rows = torch.cat(parts).requires_grad_()
    sizes = [len(part) for part in parts]
    del parts
    loss = loss_function(rows)
    torch.autograd.backward(loss if scale is None else scale(loss))
    assert rows.grad is not None
    gradients = torch.split(rows.grad, sizes)

    for k, (chunk, state, gradient) in enumerate(zip(chunks, states, gradients)):
        _set_random_state(state)
        is_last = k == len(chunks) - 1
        with contextlib.nullcontext() if is_last else _no_sync(model):
            torch.autograd.backward(encode(chunk), gradient)
    return loss.detach()


def _checked(embeddings: object) -> Tensor:
    if not isinstance(embeddings, Tensor):
        raise TypeError(f"encode must return a tensor of embeddings (n, D), got {type(embeddings)}")
    return embeddings


def _random_state() -> list[Tensor]:
    state = [torch.get_rng_state()]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state.append(torch.cuda.get_rng_state())
    return state


def _set_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])


@contextlib.contextmanager
def _buffers_restored(model: nn.Module | None) -> Iterator[None]:
    """Leave the buffers of ``model``, such as running statistics, as they were."""
    buffers = [] if model is None else list(model.buffers())
    saved = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, saved):
            buffer.copy_(value)


def _no_sync(model: nn.Module | None) -> contextlib.AbstractContextManager[Any]:
    """Where gradients are averaged among processes, let them be added up first."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()
