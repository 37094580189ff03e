"""Gradient caching: the gradient of a loss over all rows, through a network chunk by chunk."""

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

    A contrastive loss needs all embeddings at once, but not their activations. So

    1. the chunks are encoded without a graph;
    2. the loss of all embeddings and its gradient by each of them are computed;
    3. each chunk is encoded again, with a graph, and its part of that gradient is backpropagated.

    The network runs forward twice. Only the activations of one chunk are in memory.

    The second pass starts from the same buffers and draws the same random numbers (CPU, the current
    CUDA device, MPS). At the end, the random state is that after the loss. So the gradients are
    bitwise those of the line above, except for the order in which chunks are added. To rounding, they
    are those of the whole batch, if rows do not affect each other in the network. With batch norm
    they do: each chunk has its own statistics, and updates the running statistics once.

    Under DistributedDataParallel:

    - The network's gradients are averaged once, in the backward of the last chunk.
    - Gradients of the loss's own parameters, such as a temperature, are not averaged. Average them
      by hand, and keep these parameters out of the network.
    - The running statistics are those of rank 0, as always under DDP.
    - Every rank needs at least one chunk. If the network itself communicates, as SyncBatchNorm does,
      all ranks need the same number of chunks.
    - With ``supcon_loss(..., group="world")`` the loss has the rows of all ranks.

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
        TypeError: chunks that can be gone through only once; embeddings that are no tensor; a loss
            that is no 0-dim tensor.
        ValueError: no chunk; a loss that does not depend on the embeddings.

    Where anything raises, random state, buffers and gradients are what they were before the
    call. So gradients that are there already are copied once.

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

    with _Undo(model) as undo:
        states, parts = [], []
        with torch.no_grad():
            for chunk in chunks:
                states.append(_random_state())
                parts.append(_checked(encode(chunk)))
        undo.restore_buffers()
        # Autocast of older torch, around this call, would go on with casts of weights without a graph.
        torch.clear_autocast_cache()

        rows = torch.cat(parts).requires_grad_()
        sizes = [len(part) for part in parts]
        del parts
        loss = _checked_loss(loss_function(rows))
        drawn = _random_state()
        undo.keep_gradients(loss)
        torch.autograd.backward(loss if scale is None else scale(loss))
        if rows.grad is None:
            raise ValueError("loss_function must return a loss that depends on the embeddings")

        for k, (chunk, gradient) in enumerate(zip(chunks, torch.split(rows.grad, sizes))):
            _set_random_state(states[k])
            is_last = k == len(chunks) - 1
            with contextlib.nullcontext() if is_last else _no_sync(model):
                embeddings = encode(chunk)
                undo.keep_gradients(embeddings)
                torch.autograd.backward(embeddings, gradient)
        _set_random_state(drawn)
    return loss.detach()


class _Undo:
    """Puts random state, buffers and gradients back to what they were where the block raises."""

    def __init__(self, model: nn.Module | None) -> None:
        self._buffers = [(b, b.clone()) for b in ([] if model is None else model.buffers())]
        self._random_state = _random_state()
        self._gradients: dict[Tensor, Tensor | None] = {}

    def __enter__(self) -> _Undo:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            return
        self.restore_buffers()
        _set_random_state(self._random_state)
        for leaf, gradient in self._gradients.items():
            if gradient is None or leaf.grad is None:
                leaf.grad = gradient
            else:
                leaf.grad.copy_(gradient)

    def restore_buffers(self) -> None:
        """The buffers of the model, such as running statistics, as they were."""
        with torch.no_grad():
            for buffer, value in self._buffers:
                buffer.copy_(value)

    def keep_gradients(self, root: Tensor) -> None:
        """Remember the gradients that the backward of ``root`` will add to."""
        for leaf in _leaves(root):
            if leaf not in self._gradients:
                self._gradients[leaf] = None if leaf.grad is None else leaf.grad.clone()


def _leaves(root: Tensor) -> Iterator[Tensor]:
    """The leaves of the graph of ``root``."""
    seen, todo = set(), [root.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if node.name() == "torch::autograd::AccumulateGrad" and leaf is not None:
            yield leaf
        todo += [following for following, _ in node.next_functions]


def _checked(embeddings: object) -> Tensor:
    if not isinstance(embeddings, Tensor):
        raise TypeError(f"encode must return a tensor of embeddings (n, D), got {type(embeddings)}")
    return embeddings


def _checked_loss(loss: object) -> Tensor:
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        came = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss)
        raise TypeError(f"loss_function must return a 0-dim tensor, got {came}")
    if not torch.is_grad_enabled():
        raise RuntimeError("grad_cache_backward makes gradients: call it outside torch.no_grad()")
    if not loss.requires_grad:
        raise ValueError("loss_function must return a loss that depends on the embeddings")
    return loss


def _random_state() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def _set_random_state(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    if "mps" in states:
        torch.mps.set_rng_state(states["mps"])


@contextlib.contextmanager
def _no_sync(model: nn.Module | None) -> Iterator[None]:
    """Where gradients are averaged among processes, let them be added up first."""
    with contextlib.ExitStack() as stack:
        for module in [] if model is None else model.modules():
            if isinstance(module, nn.parallel.DistributedDataParallel):
                stack.enter_context(module.no_sync())
        yield
