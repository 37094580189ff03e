"""The k-NN classifier: the weighted vote of the nearest neighbours, and its accuracy."""

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS, TEMPERATURE = 20, 0.07


def knn_predict(
    queries: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    *,
    num_classes: int,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
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
