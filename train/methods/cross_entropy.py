"""Cross-entropy of a linear classifier on the embedding: the baseline of every comparison."""

import torch.nn.functional as F
from torch import Tensor, nn

from methods.method import Method, Setup
from methods.options import MethodOptions


class CrossEntropy(Method):
    """A linear classifier, trained with the encoder; the projection head is not."""

    uses_head = False
    classifier: nn.Module

    def __init__(self, options: MethodOptions, setup: Setup) -> None:
        super().__init__()
        self.label_smoothing = options.label_smoothing
        self.classifier = nn.Linear(setup.model.num_features, len(setup.data.classes))

    def forward(self, embedded: Tensor, projected: Tensor, targets: Tensor) -> Tensor:
        """The mean over all views."""
        scores = self.classifier(embedded.float())
        repeated = targets.repeat(len(scores) // len(targets))
        return F.cross_entropy(scores, repeated, label_smoothing=self.label_smoothing)
