"""Large-margin softmax: cross-entropy with the angle to an image's own class multiplied.

Liu et al., Large-Margin Softmax Loss for Convolutional Neural Networks, arXiv 1612.02295.
"""

from typing import Any

import torch
from torch import Tensor, nn

from methods.method import Method, Setup
from methods.metric_learning import metric_learning
from methods.options import MethodOptions


class Scores(nn.Module):
    """The scores of a loss of pytorch-metric-learning that holds a classifier, without its margin."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, embedded: Tensor) -> Tensor:
        """(B, F) to (B, C)."""
        scores: Tensor = self.loss.get_logits(embedded)
        return scores


class MaxMargin(Method):
    """A linear classifier without bias, trained with the encoder; the projection head is not.

    The margin comes in step by step, as the paper trains it: from the start on it would drive all
    embeddings to zero.
    """

    uses_head = False
    classifier: Scores

    def __init__(self, options: MethodOptions, setup: Setup) -> None:
        super().__init__()
        loss = metric_learning("losses", method="max_margin").LargeMarginSoftmaxLoss(
            num_classes=len(setup.data.classes),
            embedding_size=setup.model.num_features,
            margin=int(options.margin_or_default),
        )
        # From the library's own scores, of variance F, it does not learn.
        nn.init.xavier_uniform_(loss.W)
        with_margin = loss.modify_cosine_of_target_classes

        def blended(cosines: Tensor) -> Tensor:
            return torch.lerp(cosines, with_margin(cosines), share_of_margin(self.step))

        loss.modify_cosine_of_target_classes = blended
        self.classifier = Scores(loss)
        self.step = 0

    def prepare(self, views: list[Tensor], targets: Tensor, step: int) -> None:
        """The margin of a step is a function of its number."""
        self.step = step

    def forward(self, embedded: Tensor, projected: Tensor, targets: Tensor) -> Tensor:
        """The mean over all views."""
        repeated = targets.repeat(len(embedded) // len(targets))
        loss: Tensor = self.classifier.loss(embedded.float(), repeated)
        return loss


def share_of_margin(step: int) -> float:
    """Of the angle with the margin in what the loss takes for the angle, from 0.001 to 1/6."""
    # 1 / (1 + lambda), with the lambda of the authors' later SphereFace.
    return 1 / (1 + max(5.0, 1000 / (1 + 0.12 * step)))
