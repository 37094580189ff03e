"""The k-NN classifier: the weighted vote of the nearest neighbours, and its accuracy.

Several processes each compare the queries with their share of the bank, and merge the nearest. They
multiply the very blocks that one process would, so that their votes are bitwise equal to its.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.embeddings import EMBED_BATCH_SIZE
from run.processes import ALONE, Ranks

NEIGHBOURS, TEMPERATURE = 20, 0.07
MASK_32 = 2**32 - 1
# Less than the key of every similarity.
NOTHING = -(2**63)


def knn_predict(
    queries: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    *,
    num_classes: int,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    chunk: int = 1024,
    first: int = 0,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Classify by the vote of the nearest neighbours in cosine similarity.

    A neighbour of similarity s votes for its label with weight exp(s / temperature) (Wu et al.,
    arXiv 1805.01978). Of equal neighbours in different blocks the first counts as nearer.

    Args:
        queries: (N, F), any scale; of several processes the same.
        bank: (m, F), any scale: this process's share of M rows; only min(neighbours, M) of them vote.
        bank_labels: (M,) integers below num_classes, of all processes' rows.
        chunk: queries compared at a time with a block: memory is O(chunk * EMBED_BATCH_SIZE).
        first: the number of the bank's first row among the M; a multiple of EMBED_BATCH_SIZE.
        ranks: the processes that hold the M rows.

    Returns:
        (N,) predicted labels.
    """
    nearest = _nearest(queries, bank, neighbours, chunk=chunk, first=first)
    similarity, number = _from_keys(_merged(nearest, min(neighbours, len(bank_labels)), ranks))
    predictions = []
    for weights, labels in zip(
        (similarity / temperature).exp().split(chunk),
        bank_labels.to(number.device)[number].split(chunk),
    ):
        votes = weights.new_zeros(len(weights), num_classes)
        predictions.append(votes.scatter_add_(1, labels, weights).argmax(1))
    return torch.cat(predictions).to(queries.device)


def _nearest(queries: Tensor, bank: Tensor, neighbours: int, *, chunk: int, first: int) -> Tensor:
    """The keys of the nearest of a share, (N, neighbours), the nearest first, then NOTHING."""
    queries = F.normalize(queries.float(), dim=1)
    # MPS sorts no 64-bit integers in some versions of macOS.
    device = torch.device("cpu") if queries.device.type == "mps" else queries.device
    nearest = torch.full((len(queries), neighbours), NOTHING, device=device)
    for start in range(0, len(bank), EMBED_BATCH_SIZE):
        block = F.normalize(bank[start : start + EMBED_BATCH_SIZE].float(), dim=1)
        for part, best in zip(queries.split(chunk), nearest.split(chunk)):
            found = (part @ block.T).topk(min(neighbours, len(block)), dim=1)
            keys = _keys(found.values.to(device), found.indices.to(device) + (first + start))
            best.copy_(torch.cat([best, keys], dim=1).topk(neighbours, dim=1).values)
    return nearest


def _merged(nearest: Tensor, neighbours: int, ranks: Ranks) -> Tensor:
    """The keys of the nearest of all shares, (N, neighbours)."""
    shares = ranks.all_gather_rows(nearest).view(ranks.world_size, *nearest.shape)
    return shares.transpose(0, 1).flatten(1).topk(neighbours, dim=1).values


def _keys(similarity: Tensor, number: Tensor) -> Tensor:
    """64-bit integers in the order of similarities, of equal ones the lowest number first."""
    return (_flipped(similarity.view(torch.int32)).long() << 32) | (MASK_32 - number)


def _from_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    bits = _flipped((keys >> 32).to(torch.int32))
    return bits.view(torch.float32), MASK_32 - (keys & MASK_32)


def _flipped(bits: Tensor) -> Tensor:
    # The bits of a float, but for those below the sign, are in the order of integers.
    return torch.where(bits < 0, bits ^ (2**31 - 1), bits)


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """The share of (N,) predictions that equal the (N,) labels."""
    # Divided in Python: a float32 share is written as 0.6200000047683716.
    return int((predictions == labels).sum()) / len(labels)
