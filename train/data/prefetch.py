"""Batches on their way to the device, for which the host does not wait."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; CUDA copies it from main memory while the host goes on."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


def on_device_ahead(
    batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels on a device; to CUDA they are copied beside its work on those before."""
    if device.type != "cuda":
        for images, labels in batches:
            yield images.to(device), labels.to(device)
        return
    stream = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(stream):
            images, labels = (on_device(part, device) for part in batch)
        work = torch.cuda.current_stream(device)
        work.wait_stream(stream)
        for part in (images, labels):
            part.record_stream(work)  # its memory stays until that work is done
        yield images, labels
