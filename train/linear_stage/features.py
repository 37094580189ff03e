"""The embeddings of whole splits, as the linear stage reads them: in order, again, or standardised.

Images are held a batch at a time. Embeddings that would take too much memory lie in a file.
"""

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from data.batches import sequential_batches
from data.images import Split
from data.prefetch import on_device
from evaluation.embeddings import EMBED_BATCH_SIZE
from run.errors import UserError

# Embeddings that are taken to the device, and classified, at a time.
CHUNK = 16384


def embedded_batches(
    encode: Callable[[Tensor], Tensor], split: Split, *, device: torch.device, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The (B, F) embeddings and (B,) labels of a split in order, on a device.

    Args:
        encode: (B, C, S, S) uint8 on `device` to (B, F).
    """
    batches = sequential_batches(split, batch_size=EMBED_BATCH_SIZE, workers=workers, device=device)
    for images, labels in batches:
        with torch.no_grad():
            embedded = encode(images)
        yield embedded, labels


class Features:
    """All embeddings of a split, on its device, or in a file where they are larger than a limit.

    Args:
        batches: (B, F) embeddings and (B,) labels on the device, `num_rows` in all.
        limit: the bytes from which on they lie in a file in `folder`. It has no name there: the
            system removes it when the process ends, however it ends.

    Attributes:
        rows: (N, F).
        labels: (N,), on the device.
    """

    def __init__(
        self,
        batches: Iterator[tuple[Tensor, Tensor]],
        num_rows: int,
        *,
        device: torch.device,
        limit: float,
        folder: Path,
    ) -> None:
        self.device = device
        self.labels = torch.empty(num_rows, dtype=torch.long, device=device)
        start = 0
        for embedded, labels in batches:
            if start == 0:
                shape = (num_rows, embedded.shape[1])
                if 4 * math.prod(shape) > limit:
                    self.rows = _in_file(shape, folder)
                else:
                    self.rows = torch.empty(shape, dtype=torch.float32, device=device)
            self.rows[start : start + len(embedded)] = embedded
            self.labels[start : start + len(labels)] = labels
            start += len(embedded)

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Embeddings and labels on the device, a part at a time."""
        for rows, labels in zip(self.rows.split(CHUNK), self.labels.split(CHUNK)):
            yield on_device(rows, self.device), labels

    def standardize(self) -> tuple[Tensor, Tensor]:
        """Give every feature mean 0 and standard deviation 1; returns the (F,) ones that they had."""
        num_rows = len(self.rows)
        # float64, which MPS does not have.
        wide = torch.float32 if self.rows.device.type == "mps" else torch.float64
        mean = torch.stack([part.sum(0, dtype=wide) for part in self._parts()]).sum(0) / num_rows
        squares = torch.stack([(part - mean).square().sum(0) for part in self._parts()]).sum(0)
        mean, std = mean.float(), (squares / max(num_rows - 1, 1)).sqrt().float().clamp(min=1e-6)
        for part in self._parts():
            part.sub_(mean).div_(std)
        return mean.to(self.device), std.to(self.device)

    def _parts(self) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = self.rows.split(CHUNK)
        return parts


def _in_file(shape: tuple[int, int], folder: Path) -> Tensor:
    """A float32 tensor in a file whose name is gone already.

    Raises:
        UserError: it cannot be made, for instance because the disk is full.
    """
    count = math.prod(shape)
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                # Writing where the disk is full would end the process without a word.
                os.posix_fallocate(file.fileno(), 0, 4 * count)
            else:
                file.truncate(4 * count)
            return torch.from_file(file.name, shared=True, size=count).view(shape)
    except OSError as error:
        raise UserError(
            f"{folder} cannot hold {4 * count / 2**30:.1f} GiB of features ({error.strerror}): "
            "make room there, or raise --features_gib"
        ) from error
