"""The embeddings of a whole split, and the raw pixels that they are compared with.

Nothing here draws a random number: evaluating more or less often does not change the training.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data.batches import sequential_batches
from data.corrupted import Corrupted
from data.images import Split
from data.views import Views
from network.embedder import Embedder
from run.processes import ALONE, Ranks

EMBED_BATCH_SIZE = 512
BASELINE_SIZE = 32


def encode_stored(model: Embedder, views: Views, images: Tensor) -> Tensor:
    """What the encoder makes of stored images, (B, C, S, S) uint8 to (B, F)."""
    features: Tensor = model.eval().encoder(views.plain(images))
    return features


def pixels(images: Tensor) -> Tensor:
    """The baseline that learns nothing: (B, C, S, S) uint8 to (B, C*s*s), s at most BASELINE_SIZE."""
    images = images.float()
    if images.shape[-1] > BASELINE_SIZE:
        # Whole sets of large images would not fit in memory.
        cells = _cells(images.shape[-1]).to(images.device)
        images = cells.T @ images @ cells
    return images.flatten(1)


def _cells(size: int) -> Tensor:
    """The weights (size, BASELINE_SIZE) of adaptive average pooling, which MPS has for few sizes."""
    return F.adaptive_avg_pool1d(torch.eye(size), BASELINE_SIZE)


class Share(NamedTuple):
    """The embeddings of a split, of which each process keeps those of some images.

    Attributes:
        rows: (n, F), of this process's images, one after another.
        first: the number of the first of them in the split, a multiple of EMBED_BATCH_SIZE.
        ranks: the processes that keep the others.
    """

    rows: Tensor
    first: int = 0
    ranks: Ranks = ALONE


def embed(
    encode: Callable[[Tensor], Tensor],
    split: Split | Corrupted,
    *,
    device: torch.device,
    workers: int,
    ranks: Ranks = ALONE,
    batch_size: int = EMBED_BATCH_SIZE,
) -> Tensor:
    """Encode every image of a split, in order.

    Args:
        encode: (B, C, S, S) uint8 on `device` to (B, F).
        ranks: share the work, in the very batches that one process would encode.

    Returns:
        (N, F) on `device`.
    """
    rows = _encode_share(
        encode, split, device=device, workers=workers, ranks=ranks, batch_size=batch_size
    )
    return ranks.all_gather_rows(rows)[: len(split)]


def embed_share(
    encode: Callable[[Tensor], Tensor],
    split: Split,
    *,
    device: torch.device,
    workers: int,
    ranks: Ranks = ALONE,
) -> Share:
    """The same, of which each process keeps what it has encoded: whole batches, all but the last."""
    rows = _encode_share(encode, split, device=device, workers=workers, ranks=ranks)
    first = ranks.rank * len(rows)
    return Share(rows[: max(len(split) - first, 0)], first, ranks)


@torch.no_grad()
def _encode_share(
    encode: Callable[[Tensor], Tensor],
    split: Split | Corrupted,
    *,
    device: torch.device,
    workers: int,
    ranks: Ranks,
    batch_size: int = EMBED_BATCH_SIZE,
) -> Tensor:
    """As many rows for each process, in whole batches; those of no image come last."""
    batches = sequential_batches(
        split,
        batch_size=batch_size,
        workers=workers,
        ranks=ranks,
        device=device,
    )
    rows = torch.empty(0, device=device)
    for number, (images, _) in enumerate(batches):
        encoded = encode(images)
        if number == 0:
            # Filled batch by batch: a list of them, put together at the end, takes twice the memory.
            rows = encoded.new_empty(len(batches) * batch_size, *encoded.shape[1:])
        rows[number * batch_size :][: len(encoded)] = encoded
    return rows
