"""The networks: an encoder from timm, its own or with our small stem, and the projection head."""

from textwrap import shorten
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from run.config import PretrainConfig
from run.errors import UserError
from run.out_of_memory import memory_for
from supcon_kernels.small_stem import SMALL_STEM_DEPTHS

PROJECTION_DIM = 128


class Embedder(nn.Module):
    """An encoder and the projection head that only the loss sees.

    Args:
        encoder: (N, C, s, s) images to (N, num_features).
        num_features: the length of an embedding, F.
        head: "mlp", two layers with the encoder's width between them, or "linear", one.
        normalize: whether the head sees embeddings scaled to length 1.
    """

    def __init__(
        self, encoder: nn.Module, num_features: int, *, head: str = "mlp", normalize: bool = False
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_features = num_features
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
    elif config.image_size is not None:
        about = timm.get_pretrained_cfg(name)
        # What has a weight for each place of an image, such as a ViT, is built for one size.
        if about and about.fixed_input_size and about.input_size[-1] != config.image_size:
            options["img_size"] = config.image_size
    return name, options


def build_model(config: PretrainConfig, *, channels: int) -> Embedder:
    """The network that a config asks for, for images of so many channels, not yet trained.

    Raises:
        UserError: there is no such encoder, or it does not embed images of the config's size.
    """
    name, options = encoder_recipe(config, channels=channels)
    size = config.image_size or 32
    # Not part of what the encoder is: weights of either beginning fit.
    start = {} if config.zero_init_residual else {"zero_init_last": False}
    try:
        with memory_for(config, "model", "width", "image_size"):
            encoder = timm.create_model(name, **options, **start)
            # Asked for and not looked up: not every model of timm has its width in one attribute.
            with torch.no_grad():
                embedded = encoder.eval()(torch.zeros(2, channels, size, size))
        if embedded.ndim != 2:
            raise ValueError(f"it gives {tuple(embedded.shape[1:])} for an image, not one vector")
    except UserError:
        raise
    except Exception as error:  # timm and its models raise whatever they like
        if start and "zero_init_last" in str(error):
            raise UserError(
                f"--zero_init_residual false: --model {config.model} has no such residual blocks"
            ) from error
        reason = shorten(" ".join(str(error).split()) or type(error).__name__, 160)
        raise UserError(
            f"--model {config.model} cannot embed images of {channels}x{size}x{size}, choose "
            f"another --model or --image_size: {reason}"
        ) from error
    return Embedder(
        encoder.train(),
        embedded.shape[1],
        head=config.head,
        normalize=config.normalize_embedding,
    )
