"""Images with the corruptions of ImageNet-C (Hendrycks and Dietterich, arXiv 1903.12261).

A corrupted image is a pure function of the image, its place, the corruption and the severity.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms

from data.images import Split
from run.seeds import seed_of

CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise",
    "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
    "snow", "frost", "fog", "brightness",
    "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
SEVERITIES = (1, 2, 3, 4, 5)
# What the library takes; its corruptions are made for 224.
SMALLEST_SIDE = 32
# These two do not draw from numpy's global generator.
SEEDED = ("impulse_noise", "glass_blur")


@dataclass(frozen=True, eq=False)
class Corrupted(Dataset[tuple[Tensor, Tensor]]):
    """The images of a split as a network would see them, corrupted; indexed as the split.

    Args:
        size: the side of the centre that the network sees.
        side: an image smaller than this is enlarged to it, corrupted and reduced again.
    """

    split: Split
    corruption: str
    severity: int
    size: int
    side: int
    in_memory = False

    def __len__(self) -> int:
        return len(self.split)

    @property
    def image_bytes(self) -> int:
        """The bytes of a corrupted image."""
        channels = self.split.image_bytes // self.split.stored_size**2
        return channels * self.size**2

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        images, labels = self.split[indices]
        images = transforms.center_crop(images, [self.size, self.size])
        side = max(self.side, self.size)
        enlarged = transforms.resize(images, [side, side], antialias=True)
        corrupted = self._corrupt(enlarged, indices)
        return transforms.resize(corrupted, [self.size, self.size], antialias=True), labels

    def _corrupt(self, images: Tensor, places: list[int]) -> Tensor:
        # An extra of the installation, which training does without.
        from imagecorruptions import corrupt

        coloured = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
        corrupted = []
        state = np.random.get_state()
        try:
            for image, place in zip(coloured, places):
                number = CORRUPTIONS.index(self.corruption)
                seed = seed_of(number, self.severity, place) % 2**32
                np.random.seed(seed)
                seeded = {"seed": seed} if self.corruption in SEEDED else {}
                corrupted.append(corrupt(image, self.severity, self.corruption, **seeded))
        finally:
            np.random.set_state(state)
        results = torch.from_numpy(np.stack(corrupted)).permute(0, 3, 1, 2)
        # The library knows colour alone, and gives each channel its own noise. Of a grey image one
        # channel is taken: the mean of three would be less noisy. Green is the nearest to grey.
        return results if images.shape[1] == 3 else results[:, 1:2]
