"""The scales at which the claims can be tested: a data set, a network and its training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reproduction.methods import AUGMENTS, METHODS

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
# Where a linear stage is trained on random views and the scale has no recipe for it.
TRAINED_LINEAR: dict[str, Any] = {
    "protocol": "paper", "optimizer": "momentum", "learning_rate": 5.0, "epochs": 20, "batch_size": 128,
}  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """The data set, the network and the training of all runs.

    Attributes:
        recipe: a file of train/recipes that `options` change.
        trial_epochs: of a run that tries a learning rate.
        linear: a file of train/recipes/linear; without it the linear stage is the convex one.
        corruption_images: test images that are corrupted; 0: all.
        augments: those that Table 9 compares.
    """

    recipe: str
    options: dict[str, Any]
    trial_epochs: int
    linear: str | None = None
    corruption_images: int = 0
    augments: tuple[str, ...] = AUGMENTS[0]

    def has(self, method: str) -> bool:
        """Whether a method can be run: the policies of colours need images of colours."""
        return method not in METHODS or set(METHODS[method].augments) <= set(self.augments)


SCALES = {
    "digits": Scale("digits.yaml", {}, 12),
    "fmnist10k": Scale(
        "fashion_mnist.yaml",
        {
            "train_images": 10_000, "image_size": 16, "width": 16, "batch_size": 128,
            "epochs": 30, "warmup_epochs": 4,
        },
        6,
        corruption_images=1000,
    ),
    "fmnist": Scale("fashion_mnist.yaml", {"width": 64, "precision": "bf16"}, 10),
    "cifar10": Scale("cifar10.yaml", {}, 50, "cifar10.yaml", augments=AUGMENTS[1]),
    "imagenet": Scale("imagenet_rn50.yaml", {}, 20, "imagenet_rn50.yaml", augments=AUGMENTS[1]),
}  # fmt: skip
