"""The memory of a training step, estimated before the first: no row is computed for it.

A network without memory (on torch's meta device) embeds a few rows. What autograd would save of them is
linear in the number of rows.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from data.images import ImageData
from network.embedder import PROJECTION_DIM, build_model
from run.options import PretrainOptions
from training.optimizer import build_optimizer
from training.trainer import AUTOCAST, StepOptions, Trainer

GIB = 2**30
FLOAT = 4
# The loss holds its rows of float32: as they are, normalised, of all ranks, prepared, and their gradients.
LOSS_COPIES = 6
# A batch and the one that is fetched meanwhile; each view, and all of them together.
BATCHES, VIEW_COPIES = 2, 2
# The share of a GPU that an estimate may take: cuDNN's workspaces and fragments of memory are not in it.
USABLE = 0.9
# What autocast computes in 16 bits.
PRODUCTS = {
    torch.conv1d, torch.conv2d, torch.conv3d, torch.nn.functional.linear, torch.mm, torch.addmm,
    torch.bmm, torch.baddbmm, torch.matmul, Tensor.matmul, Tensor.__matmul__,
    torch.nn.functional.scaled_dot_product_attention,
}  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Bytes of one process in a step.

    Attributes:
        weights: parameters, buffers and gradients; averages of the weights and DDP's buckets.
        optimizer: its state.
        activations: what autograd saves of the rows that are embedded at a time.
        backward: the gradients of the largest of them, as an operation takes and gives them.
        images: batches and views.
        loss: embeddings and projections of all rows, and their gradients.
    """

    weights: int
    optimizer: int
    activations: int
    backward: int
    images: int
    loss: int

    @property
    def total(self) -> int:
        """Of all parts."""
        return sum(self._parts().values())

    def _parts(self) -> dict[str, int]:
        return {part.name: getattr(self, part.name) for part in fields(self)}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in self._parts().items())
        return f"estimated memory of a step: {_gib(self.total)} GiB a process ({parts})"


def estimate_memory(
    options: PretrainOptions,
    data: ImageData,
    *,
    num_views: int,
    num_embedded: int | None = None,
    world_size: int = 1,
) -> Memory:
    """What one of `world_size` processes needs for a step; where it is compiled, less.

    Args:
        num_embedded: of the views of an image those that are embedded with gradient; None: all.
    """
    num_embedded = num_embedded or num_views
    num_images = options.batches.batch_size // world_size
    rows = num_images * num_embedded
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = build_model(options.network, channels=data.channels, image_size=data.image_size)
        optimizer = build_optimizer(options.optimizer, model)
        for weight in model.parameters():
            weight.grad = torch.empty_like(weight)
        optimizer.step()
    parameters, buffers = num_bytes(model.parameters()), num_bytes(model.buffers())
    # CMC trains two networks of this kind; a queue has keys from an average of one.
    networks = 2 if options.method.method == "cmc" else 1
    averages = (options.step.ema_decay is not None) + (options.method.num_keys is not None)
    buckets = world_size > 1
    view_pixels = data.channels * data.image_size**2
    # Of files every view is cut where they are decoded.
    in_memory = isinstance(data.train.images, Tensor)
    image_bytes = data.train.image_bytes if in_memory else num_views * view_pixels
    chunk = min(rows, options.step.grad_cache_chunk or rows)
    saved, largest = saved_by_autograd(model, options.step, data, chunk)
    return Memory(
        weights=(2 * networks + averages + buckets) * parameters + (networks + averages) * buffers,
        optimizer=networks
        * num_bytes(
            value
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ),
        activations=networks * saved,
        backward=2 * largest,
        images=num_images * (BATCHES * image_bytes + VIEW_COPIES * num_views * view_pixels * FLOAT),
        loss=networks
        * FLOAT
        * rows
        * (LOSS_COPIES * PROJECTION_DIM * world_size + model.num_features),
    )


def saved_by_autograd(
    model: nn.Module, options: StepOptions, data: ImageData, num_rows: int
) -> tuple[int, int]:
    """The bytes that autograd saves of so many rows, and of the largest tensor among it.

    Args:
        model: on the meta device.
    """
    few, more = 2, 4
    (least, largest), (most, _) = (_saved_of(model, options, data, n) for n in (few, more))
    per_row = (most - least) / (more - few)
    return round(least + (num_rows - few) * per_row), round(num_rows * largest / few)


def _saved_of(
    model: nn.Module, options: StepOptions, data: ImageData, num_rows: int
) -> tuple[int, int]:
    images = torch.empty(num_rows, data.channels, data.image_size, data.image_size, device="meta")
    kept = SavedTensors([*model.parameters(), *model.buffers(), images])
    with kept, _Autocast(AUTOCAST.get(options.precision, torch.float32)):
        model(images)
    sizes = kept.sizes()
    return sum(sizes), max(sizes, default=0)


class _Autocast(TorchFunctionMode):
    """torch.autocast for the meta device, which it does not know: products are of this dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in PRODUCTS:
            args, kwargs = tree_map(self._cast, (args, kwargs))
        return func(*args, **kwargs)

    def _cast(self, value: Any) -> Any:
        is_cast = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self.dtype) if is_cast else value


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """While entered, counts the memory that autograd saves for a backward.

    Args:
        others: tensors that are there anyway, such as weights.
    """

    def __init__(self, others: Iterable[Tensor]) -> None:
        known = {tensor.untyped_storage()._cdata for tensor in others}
        # Held, so that no other memory gets the same name.
        self._kept: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                self._kept[storage._cdata] = storage
            return tensor

        super().__init__(pack, lambda tensor: tensor)

    def sizes(self) -> list[int]:
        """Bytes, of each memory once."""
        return [storage.nbytes() for storage in self._kept.values()]


def fitting_chunk(memory: Memory, num_rows: int, available: int) -> int | None:
    """The largest --grad_cache_chunk whose step fits, by an estimate for so many rows at a time."""
    of_rows = memory.activations + memory.backward
    fits = int((USABLE * available - (memory.total - of_rows)) / (of_rows / num_rows))
    return min(fits, num_rows) if fits > 0 else None


def say_memory(options: PretrainOptions, data: ImageData, trainer: Trainer) -> None:
    """Print the estimate for a trainer, and a warning if its GPU has less."""
    num_embedded = trainer.method.num_embedded or trainer.num_views
    try:
        memory = estimate_memory(
            options,
            data,
            num_views=trainer.num_views,
            num_embedded=num_embedded,
            world_size=trainer.ranks.world_size,
        )
    except Exception as error:  # the models of timm raise whatever they like
        print(
            f"no estimate of memory for --model {options.network.model}: {shorten(str(error), 160)}"
        )
        return
    print(memory)
    if trainer.device.type != "cuda":
        return
    available = torch.cuda.get_device_properties(trainer.device).total_memory
    if memory.total > USABLE * available:
        rows = options.batches.batch_size // trainer.ranks.world_size * num_embedded
        num_rows = min(rows, options.step.grad_cache_chunk or rows)
        chunk = fitting_chunk(memory, num_rows, available)
        or_chunk = f", or give --grad_cache_chunk {chunk}" if chunk else ""
        print(
            f"warning: it may not fit in the {_gib(available)} GiB of this GPU: lower "
            f"--batch_size{or_chunk}",
            file=sys.stderr,
        )


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Of all tensors together."""
    return sum(tensor.nbytes for tensor in tensors)


def _gib(size: int) -> str:
    return f"{size / GIB:.0f}" if size >= 100 * GIB else f"{size / GIB:.3g}"
