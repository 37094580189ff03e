"""The networks: an encoder from timm, its own or with our small stem, and the projection head."""

from dataclasses import dataclass
from textwrap import shorten
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from run.errors import UserError
from run.out_of_memory import out_of_memory_names
from run.rules import LARGEST, broken, out_of_range
from supcon_kernels.small_stem import SMALL_STEM_DEPTHS

PROJECTION_DIM = 128
# Of float32 in a register of AVX-512.
VECTOR_CHANNELS = 16


@dataclass
class NetworkOptions:
    """The network.

    Args:
        model: Small stem: resnet10, 18, 34, 50, 101, 152 or 200. Standard stem: any timm model that
            accepts images of image_size.
        stem: small: 3x3 with stride 1, for images up to about 64 pixels. standard: that of the model.
        zero_init_residual: Initialise the last batch norm of each residual block to zero, so that the
            block starts as the identity (timm models with zero_init_last). SupContrast: to one.
        width: Channels of the first stage, doubled in each of the next three (small stem only).
        head: Projection head. mlp: two layers. linear: one layer, as in the paper's ImageNet recipe.
        normalize_embedding: Normalise embeddings before the head, as in that recipe.
        channels_last: Use the channels-last memory format from a width of 16 on. Convolutions are
            usually faster with it.
    """

    model: str = "resnet18"
    stem: Literal["small", "standard"] = "small"
    zero_init_residual: bool = True
    width: int = 16
    head: Literal["mlp", "linear"] = "mlp"
    normalize_embedding: bool = False
    channels_last: bool = True

    @property
    def memory_format(self) -> torch.memory_format:
        """How images and filters lie in memory."""
        # oneDNN's backward of a 1x1 convolution of 8 channels reads past the end: torch 2.14, AVX-512.
        is_narrow = self.stem == "small" and self.width < VECTOR_CHANNELS
        use = self.channels_last and not is_narrow
        return torch.channels_last if use else torch.contiguous_format

    def mistakes(self) -> list[str]:
        """What is out of range or contradicts itself, one sentence each."""
        rules = [
            (
                self.stem == "small" or self.width == NetworkOptions.width,
                "--width contradicts --stem standard: the model's own channels are used",
            )
        ]
        return broken(rules) + out_of_range(self, at_least={"width": 4}, at_most={"width": LARGEST})


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


def encoder_recipe(
    options: NetworkOptions, *, channels: int, image_size: int | None
) -> tuple[str, dict[str, Any]]:
    """The name and the arguments from which timm.create_model builds the encoder."""
    arguments: dict[str, Any] = {"in_chans": channels, "num_classes": 0}
    name = options.model
    if options.stem == "small":
        depths = {f"resnet{depth}": depth for depth in SMALL_STEM_DEPTHS}
        if name not in depths:
            raise UserError(f"--model {name}: with --stem small one of {', '.join(depths)}")
        return "small_stem_resnet", arguments | {"depth": depths[name], "width": options.width}
    if not timm.is_model(name):
        raise UserError(f"--model {name}: timm has no model of that name")
    about = timm.get_pretrained_cfg(name)
    # What has a weight for each place of an image, such as a ViT, is built for one size.
    if about and about.fixed_input_size and image_size not in (None, about.input_size[-1]):
        arguments["img_size"] = image_size
    return name, arguments


def build_model(
    options: NetworkOptions, *, channels: int, image_size: int | None = None
) -> Embedder:
    """The network that the options ask for, not yet trained.

    Args:
        channels, image_size: of the images that it is to embed; at the default of any size.

    Raises:
        UserError: there is no such encoder, or it does not embed such images.
    """
    name, arguments = encoder_recipe(options, channels=channels, image_size=image_size)
    size = image_size or 32
    # Not part of what the encoder is: weights of either beginning fit.
    start: dict[str, Any] = {} if options.zero_init_residual else {"zero_init_last": False}
    try:
        with out_of_memory_names(model=options.model, width=options.width, image_size=image_size):
            encoder = timm.create_model(name, **arguments, **start)
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
                f"--no_zero_init_residual: --model {options.model} has no such residual blocks"
            ) from error
        reason = shorten(" ".join(str(error).split()) or type(error).__name__, 160)
        raise UserError(
            f"--model {options.model} cannot embed images of {channels}x{size}x{size}, choose "
            f"another --model or --image_size: {reason}"
        ) from error
    model = Embedder(
        encoder.train(),
        embedded.shape[1],
        head=options.head,
        normalize=options.normalize_embedding,
    )
    return model.to(memory_format=options.memory_format)
