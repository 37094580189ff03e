"""The N-pair loss: of each class one pair, against the pairs of all other classes.

Sohn, Improved Deep Metric Learning with Multi-class N-pair Loss Objective, NIPS 2016.
"""

import torch
from torch import Tensor

from methods.method import Method, Setup
from methods.metric_learning import metric_learning
from methods.options import MethodOptions

# Of the squared lengths, which nothing else bounds; as in the paper.
LENGTH_PENALTY = 0.002


class NPairs(Method):
    """The N-pair loss of the projections of this process, as they are, with a penalty on their length."""

    def __init__(self, options: MethodOptions, setup: Setup) -> None:
        super().__init__()
        losses, distances, regularizers = (
            metric_learning(part, method="n_pairs")
            for part in ("losses", "distances", "regularizers")
        )
        self.loss = losses.NPairsLoss(
            distance=distances.DotProductSimilarity(normalize_embeddings=False),
            embedding_regularizer=regularizers.LpRegularizer(p=2, power=2),
            embedding_reg_weight=LENGTH_PENALTY,
        )

    def forward(self, embedded: Tensor, projected: Tensor, targets: Tensor) -> Tensor:
        """The mean over all sets of pairs: each view is in one pair, each set has a class once."""
        repeated = targets.repeat(len(projected) // len(targets))
        rows = projected.float()
        losses = [self.loss(rows[chosen], repeated[chosen]) for chosen in sets_of_pairs(repeated)]
        return torch.stack(losses).mean()


def sets_of_pairs(labels: Tensor) -> list[Tensor]:
    """Indices of (N,) labels, in the k-th set the k-th pair of each class that has so many."""
    order = labels.argsort(stable=True)
    is_first = torch.ones_like(order, dtype=torch.bool)
    is_first[1:] = labels[order].diff() != 0
    places = torch.arange(len(order), device=order.device)
    number = places - (places * is_first).cummax(0).values  # within its class
    num_sets = max(1, (int(number.max()) + 1) // 2)
    return [order[number // 2 == k] for k in range(num_sets)]
