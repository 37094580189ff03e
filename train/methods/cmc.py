"""CMC: two encoders see two kinds of view of an image, which are each other's positives.

Tian et al., Contrastive Multiview Coding, arXiv 1906.05849.
"""

import math

import kornia
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.images import ImageData
from methods.contrastive import Contrastive
from methods.method import Setup
from methods.options import MethodOptions
from network.embedder import build_model, sync_batch_norms
from run.errors import UserError


class CMC(Contrastive):
    """The network sees images as they are; a second one their colours, or of grey images the edges.

    So the network can be used without the second one. In the paper it sees lightness alone, and both
    kinds are of one random view.
    """

    uses_labels = False
    num_embedded = 1

    def __init__(self, options: MethodOptions, setup: Setup) -> None:
        super().__init__(options, setup)
        if self.collapsed_loss is not None:
            self.collapsed_loss = self.scale * math.log(setup.batch_size)
        data = setup.data
        self.kind = Colours(data.mean, data.std) if data.channels == 3 else Edges()
        channels = 2 if data.channels == 3 else 1
        second = build_model(setup.network, channels=channels, image_size=data.image_size)
        if any(isinstance(layer, nn.SyncBatchNorm) for layer in setup.model.modules()):
            second = sync_batch_norms(second)
        if setup.compiled:
            second.compile(dynamic=False)
        self.second = second
        self.others: Tensor | None = None

    def check(self, data: ImageData) -> None:
        """Refuse colour images without a colour."""
        first, _ = data.train[list(range(min(64, len(data.train))))]
        if data.channels == 3 and bool((first == first[:, :1]).all()):
            raise UserError(
                f"--method cmc contrasts images with their colours, and those of {data.name} are "
                "grey: --in_chans 1 contrasts them with their edges"
            )

    def prepare(self, views: list[Tensor], targets: Tensor, step: int) -> None:
        """Project the second kind of the last view: of the one that the network sees, or of another."""
        self.others = self.second(self.kind(views[-1]))[1].float()

    def forward(self, embedded: Tensor, projected: Tensor, targets: Tensor) -> Tensor:
        """The mean of both directions."""
        own, others = projected.float(), self.others
        assert others is not None
        self.others = None  # its graph is not kept for longer than the step
        there = self.contrast(own, None, contrast_features=others)
        back = self.contrast(others, None, contrast_features=own)
        return (there + back) / 2


class Colours(nn.Module):
    """What is not lightness of normalised (B, 3, s, s) images: the two colour channels of YCbCr."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 2, s, s), from -1 to 1."""
        pixels = (images * self.std + self.mean).clamp(0, 1)
        colours: Tensor = 2 * kornia.color.rgb_to_ycbcr(pixels)[:, 1:] - 1
        return colours


class Edges(nn.Module):
    """The magnitude of the gradient of (B, 1, s, s) images, by Sobel's filters."""

    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Kept, where kornia.filters.sobel would send them to a GPU in every step.
        filters = kornia.filters.get_spatial_gradient_kernel2d("sobel", 1)[:, None] / 8
        self.register_buffer("filters", filters, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, s, s)."""
        slopes = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), self.filters)
        magnitude: Tensor = slopes.norm(dim=1, keepdim=True)
        return magnitude
