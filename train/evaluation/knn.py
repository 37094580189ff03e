"""The k-NN classifier: the weighted vote of the nearest neighbours, and its accuracy.

Several processes each compare the queries with their share of the bank, and merge the nearest. They
multiply the very blocks that one process would, so that their votes are bitwise equal to its.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.embeddings import EMBED_BATCH_SIZE, Share

NEIGHBOURS, TEMPERATURE = 20, 0.07
# Queries that are compared with a block of the bank at a time.
CHUNK = 1024
MASK_32 = 2**32 - 1
# Less than the key of every similarity.
NOTHING = -(2**63)


def knn_predict(
    queries: Tensor,
    bank: Tensor | Share,
    bank_labels: Tensor,
    *,
    num_classes: int,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Classify by the vote of the nearest neighbours in cosine similarity.

    A neighbour of similarity s votes for its label with weight exp(s / temperature) (Wu et al.,
    arXiv 1805.01978). Of equal neighbours in different blocks the first counts as nearer.

    Args:
        queries: (N, F), any scale; the same for every process.
        bank: (M, F), any scale, or this process's share of them; only min(neighbours, M) vote.
        bank_labels: (M,) integers below num_classes.

    Returns:
        (N,) predicted labels.
    """
    share = bank if isinstance(bank, Share) else Share(bank)
    keys = nearest(queries, share, min(neighbours, len(bank_labels)))
    similarity, number = _from_keys(keys)
    predictions = []
    for weights, labels in zip(
        (similarity / temperature).exp().split(CHUNK),
        bank_labels.to(number.device)[number].split(CHUNK),
    ):
        votes = weights.new_zeros(len(weights), num_classes)
        predictions.append(votes.scatter_add_(1, labels, weights).argmax(1))
    return torch.cat(predictions).to(queries.device)


def nearest(queries: Tensor, bank: Share, neighbours: int) -> Tensor:
    """The keys of the nearest of a bank, (N, neighbours), the nearest first; memory is O(N)."""
    queries = F.normalize(queries.float(), dim=1)
    # MPS sorts no 64-bit integers in some versions of macOS.
    device = torch.device("cpu") if queries.device.type == "mps" else queries.device
    keys = torch.full((len(queries), neighbours), NOTHING, device=device)
    for start in range(0, len(bank.rows), EMBED_BATCH_SIZE):
        block = F.normalize(bank.rows[start : start + EMBED_BATCH_SIZE].float(), dim=1)
        first = bank.first + start
        for part, best in zip(queries.split(CHUNK), keys.split(CHUNK)):
            found = (part @ block.T).topk(min(neighbours, len(block)), dim=1)
            more = _keys(found.values.to(device), found.indices.to(device) + first)
            best.copy_(torch.cat([best, more], dim=1).topk(neighbours, dim=1).values)
    shares = bank.ranks.all_gather_rows(keys).view(bank.ranks.world_size, *keys.shape)
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
