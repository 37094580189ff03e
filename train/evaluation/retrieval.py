"""How well the nearest neighbours of an embedding are of one class: recall at k and MAP at R.

As metric learning reports them (Musgrave et al., arXiv 2003.08505): every image asks for the others
of its class, by cosine similarity. Images whose class has no other ask nothing.
"""

from functools import partial
from typing import Any

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from torch import Tensor

from evaluation.classification import rounded
from run.processes import ALONE, Ranks

# Queries compared with all images at a time.
QUERIES = 1000
NAMES = {
    "recall_at_1": "recall@1",
    "recall_at_2": "recall@2",
    "recall_at_4": "recall@4",
    "recall_at_8": "recall@8",
    "mean_average_precision_at_r": "map@r",
}


def _recall(k: int, *, knn_labels: Tensor, query_labels: Tensor, **_: Any) -> float:
    hits = (knn_labels[:, :k] == query_labels[:, None]).any(1)
    return float(hits.double().mean())


class Retrieval(AccuracyCalculator):  # type: ignore[misc]
    """The library's measures, and the recall at k: whether one of the k nearest is of the class."""

    # It finds measures by their names.
    calculate_recall_at_1 = staticmethod(partial(_recall, 1))
    calculate_recall_at_2 = staticmethod(partial(_recall, 2))
    calculate_recall_at_4 = staticmethod(partial(_recall, 4))
    calculate_recall_at_8 = staticmethod(partial(_recall, 8))

    def requires_knn(self) -> list[str]:
        """The measures that need neighbours."""
        return list(NAMES)

    def determine_k(self, bin_counts: Tensor, num_references: int, _: bool) -> int:
        """How many neighbours these measures need."""
        return min(max(int(bin_counts.max()) - 1, 8), num_references - 1)


def retrieve(
    embeddings: Tensor, labels: Tensor, *, ranks: Ranks = ALONE, queries: int = QUERIES
) -> dict[str, float | None]:
    """The measures of (N, F) embeddings with (N,) labels; None where no class has two images.

    Args:
        ranks: share the queries.
        queries: compared at a time: memory is O(queries * N).
    """
    if embeddings.device.type == "mps":  # which has no float64
        embeddings = embeddings.cpu()
    measure = Retrieval(
        include=tuple(NAMES),
        device=embeddings.device,
        knn_func=CustomKNN(CosineSimilarity()),
    )
    asking = (labels.bincount()[labels] > 1).nonzero().flatten()
    if len(asking) == 0:
        return dict.fromkeys(NAMES.values())
    blocks = asking.split(queries)
    own = []
    for block in blocks[ranks.rank :: ranks.world_size]:
        # The library wants the queries first among the images that they are compared with.
        others = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        others[block] = False
        order = torch.cat([block, others.nonzero().flatten()])
        found = measure.get_accuracy(
            embeddings[block], labels[block], embeddings[order], labels[order], True
        )
        own.append({name: value * len(block) for name, value in found.items()})
    # In the order of the blocks, so that their sums do not depend on the number of processes.
    shares = ranks.all_gather(own)
    found_of = [shares[k % ranks.world_size][k // ranks.world_size] for k in range(len(blocks))]
    return {
        title: rounded(sum(found[name] for found in found_of) / len(asking))
        for name, title in NAMES.items()
    }
