"""Cross-entropy and SupCon at once, in one stage: a classifier beside the projection head."""

from torch import Tensor

from data.images import ImageData
from methods.contrastive import Contrastive
from methods.cross_entropy import CrossEntropy
from methods.method import Setup
from methods.options import MethodOptions


class Joint(CrossEntropy):
    """The loss of the classifier plus a multiple of the contrastive one."""

    uses_head = True

    def __init__(self, options: MethodOptions, setup: Setup) -> None:
        super().__init__(options, setup)
        self.weight = options.contrast_weight
        self.contrastive = Contrastive(options, setup)

    def figures(self) -> dict[str, float]:
        """Those of the contrastive loss."""
        return self.contrastive.figures()

    def check(self, data: ImageData) -> None:
        """As the contrastive loss."""
        self.contrastive.check(data)

    def forward(self, embedded: Tensor, projected: Tensor, targets: Tensor) -> Tensor:
        """Of the rows of this process the one, of those of all the other."""
        contrast: Tensor = self.contrastive(embedded, projected, targets)
        return super().forward(embedded, projected, targets) + self.weight * contrast
