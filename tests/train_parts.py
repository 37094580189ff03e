"""What the tests build of train/ from flat options, which a run would sort into their rooms."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import train_fixtures  # noqa: F401  puts train/ on the path
from data import sources, views
from data.images import Crops, ImageData, Split
from network import embedder, weights
from network.embedder import Embedder, encoder_recipe
from run.options import PretrainOptions
from run.processes import ALONE, Ranks
from run.saved_run import open_encoder, open_run
from training.build import build_trainer
from training.trainer import Trainer


class SmallEncoder(nn.Module):
    """An encoder that a C++ compiler takes seconds for, in the place of timm's ResNet.

    Its 2 MB of weights are more than DDP sends at a time.
    """

    num_features = 700

    def __init__(
        self, block: object, layers: object, *, channels: object, in_chans: int, num_classes: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, self.num_features, 3)
        self.norm = nn.BatchNorm2d(self.num_features)
        self.last = nn.Linear(self.num_features, self.num_features)

    def init_weights(self) -> None:
        """timm's networks have it."""

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.norm(self.conv1(images)).relu().mean((2, 3)))


def options_of(**values: Any) -> PretrainOptions:
    """Options by name."""
    return PretrainOptions.from_flat(values)


def load_data(options: PretrainOptions, **how: Any) -> ImageData:
    """Their data set."""
    return sources.load_data(options.data, seed=options.seeds.seed, **how)


def build_model(options: PretrainOptions, *, channels: int) -> Embedder:
    """Their network."""
    size = options.data.image_size
    return embedder.build_model(options.network, channels=channels, image_size=size)


def build_views(options: PretrainOptions, data: ImageData, ranks: Ranks = ALONE) -> views.Views:
    """Their views."""
    return views.build_views(
        options.views,
        data,
        seed=options.seeds.seed,
        ranks=ranks,
        memory_format=options.network.memory_format,
    )


def training_images(options: PretrainOptions, data: ImageData) -> Split | Crops:
    """What their batches are drawn from."""
    return views.training_images(options.views, data, seed=options.seeds.seed)


def load_first_weights(encoder: nn.Module, options: PretrainOptions, *, channels: int) -> None:
    """Give an encoder the weights that they name."""
    size = options.data.image_size
    name, arguments = encoder_recipe(options.network, channels=channels, image_size=size)
    about = {"model": name, **arguments}
    if options.start.pretrained:
        weights.load_pretrained(encoder, about)
    else:
        path = Path(options.start.init_from)
        weights.load_encoder(encoder, about, open_encoder(path), path)


def trainer_of(
    options: PretrainOptions, data: ImageData, *, steps_per_epoch: int = 10, ranks: Ranks = ALONE
) -> Trainer:
    """Their trainer, on the CPU."""
    device = torch.device("cpu")
    return build_trainer(options, data, steps_per_epoch=steps_per_epoch, device=device, ranks=ranks)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """All that a checkpoint holds, once it is verified."""
    return open_run(path).content
