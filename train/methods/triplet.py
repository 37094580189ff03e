"""The triplet loss with semi-hard negatives. Schroff et al., FaceNet, arXiv 1503.03832."""

from torch import Tensor

from methods.method import Method, Setup
from methods.metric_learning import metric_learning
from methods.options import MethodOptions


class Triplet(Method):
    """The mean over all triplets of this process whose negative is farther than the positive, but not by the margin.

    Distances are those of projections of length 1.
    """

    def __init__(self, options: MethodOptions, setup: Setup) -> None:
        super().__init__()
        losses, miners = (metric_learning(part, method="triplet") for part in ("losses", "miners"))
        margin = options.margin_or_default
        self.miner = miners.TripletMarginMiner(margin=margin, type_of_triplets="semihard")
        self.loss = losses.TripletMarginLoss(margin=margin)

    def forward(self, embedded: Tensor, projected: Tensor, targets: Tensor) -> Tensor:
        """0 where there is no such triplet."""
        rows, repeated = projected.float(), targets.repeat(len(projected) // len(targets))
        loss: Tensor = self.loss(rows, repeated, self.miner(rows, repeated))
        return loss
