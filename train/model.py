"""The networks: an encoder from timm, its own or with our small stem, and the projection head."""

from typing import Any

import timm
import torch.nn.functional as F
from torch import Tensor, nn

from config import PretrainConfig, UserError
from supcon_kernels.small_stem import SMALL_STEM_DEPTHS

PROJECTION_DIM = 128


class Embedder(nn.Module):
    """An encoder and the projection head that only the loss sees.

    Args:
        encoder: (N, C, s, s) images to (N, encoder.num_features).
        head: "mlp", two layers with the encoder's width between them, or "linear", one.
        normalize: whether the head sees embeddings scaled to length 1.
    """

    def __init__(self, encoder: nn.Module, *, head: str = "mlp", normalize: bool = False) -> None:
        super().__init__()
        num_features = encoder.num_features
        assert isinstance(num_features, int)
        self.encoder = encoder
        self.normalize = normalize
        self.head: nn.Module
        if head == "linear":
            self.head = nn.Linear(num_features, PROJECTION_DIM)
        else:
            self.head = nn.Sequential(
                nn.Linear(num_features, num_features),
                nn.ReLU(inplace=True),
                nn.Linear(num_features, PROJECTION_DIM),
            )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embed (N, C, s, s) images as (N, F); project that to (N, 128), which the loss normalises."""
        embedded: Tensor = self.encoder(images)
        seen = F.normalize(embedded, dim=1) if self.normalize else embedded
        return embedded, self.head(seen)


def sync_batch_norms(model: Embedder) -> Embedder:
    """The model, whose batch norms take the statistics of all processes' rows; weights stay."""
    synced: Embedder = timm.layers.convert_sync_batchnorm(model)
    return synced


def encoder_recipe(config: PretrainConfig, *, channels: int) -> tuple[str, dict[str, Any]]:
    """The name and the options from which timm.create_model builds a config's encoder."""
    options: dict[str, Any] = {"in_chans": channels, "num_classes": 0}
    name = config.model
    if config.stem == "small":
        depths = {f"resnet{depth}": depth for depth in SMALL_STEM_DEPTHS}
        if config.model not in depths:
            raise UserError(f"--model {config.model}: with --stem small one of {', '.join(depths)}")
        name = "small_stem_resnet"
        options |= {"depth": depths[config.model], "width": config.width}
    elif not timm.is_model(config.model):
        raise UserError(f"--model {config.model}: timm has no model of that name")
    return name, options


def build_model(config: PretrainConfig, *, channels: int) -> Embedder:
    """The network that a config asks for, for images of so many channels, not yet trained."""
    name, options = encoder_recipe(config, channels=channels)
    encoder = timm.create_model(name, **options)
    return Embedder(encoder, head=config.head, normalize=config.normalize_embedding)
