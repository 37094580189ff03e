"""The k-NN classifier: embeddings of a whole set, the weighted vote, its accuracy.

Nothing here draws a random number: evaluating more or less often does not change the training.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from augment import Views
from config import PretrainConfig
from data import Split, sequential_batches
from model import Embedder
from ranks import ALONE, Ranks

EMBED_BATCH_SIZE = 512
BASELINE_SIZE = 32


def knn_predict(
    queries: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    *,
    num_classes: int,
    neighbours: int = PretrainConfig.knn_k,
    temperature: float = PretrainConfig.knn_temperature,
    chunk: int = 1024,
) -> Tensor:
    """Classify by the vote of the nearest neighbours in cosine similarity.

    A neighbour of similarity s votes for its label with weight exp(s / temperature) (Wu et al.,
    arXiv 1805.01978).

    Args:
        queries: (N, F), any scale.
        bank: (M, F), any scale; only min(neighbours, M) of them vote.
        bank_labels: (M,) integers below num_classes.
        chunk: queries compared at a time: memory is O(chunk * M).

    Returns:
        (N,) predicted labels.
    """
    bank = F.normalize(bank, dim=1)
    predictions = []
    for part in F.normalize(queries, dim=1).split(chunk):
        similarity, nearest = (part @ bank.T).topk(min(neighbours, len(bank)), dim=1)
        votes = part.new_zeros(len(part), num_classes)
        votes.scatter_add_(1, bank_labels[nearest], (similarity / temperature).exp())
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """The share of (N,) predictions that equal the (N,) labels."""
    # Divided in Python: a float32 share is written as 0.6200000047683716.
    return int((predictions == labels).sum()) / len(labels)


def encode_stored(model: Embedder, views: Views, images: Tensor) -> Tensor:
    """What the encoder makes of stored images, (B, C, S, S) uint8 to (B, F)."""
    features: Tensor = model.eval().encoder(views.plain(images))
    return features


def pixels(images: Tensor) -> Tensor:
    """The baseline that learns nothing: (B, C, S, S) uint8 to (B, C*s*s), s at most BASELINE_SIZE."""
    images = images.float()
    if images.shape[-1] > BASELINE_SIZE:
        # Whole sets of large images would not fit in memory.
        images = F.adaptive_avg_pool2d(images, BASELINE_SIZE)
    return images.flatten(1)


@torch.no_grad()
def embed(
    encode: Callable[[Tensor], Tensor],
    split: Split,
    *,
    device: torch.device,
    workers: int,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Encode every image of a split, in order.

    Args:
        encode: (B, C, S, S) uint8 on `device` to (B, F).
        ranks: share the work, in the very batches that one process would encode.

    Returns:
        (N, F) on `device`.
    """
    batches = sequential_batches(
        split,
        batch_size=EMBED_BATCH_SIZE,
        workers=workers,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    rows = torch.empty(0, device=device)
    for number, (images, _) in enumerate(batches):
        encoded = encode(images.to(device))
        if number == 0:
            # Filled batch by batch: a list of them, put together at the end, takes twice the memory.
            rows = encoded.new_empty(len(batches) * EMBED_BATCH_SIZE, *encoded.shape[1:])
        rows[number * EMBED_BATCH_SIZE :][: len(encoded)] = encoded
    return ranks.gather_rows(rows)[: len(split)]
