"""timm's ResNet with a stem for small images, registered for timm.create_model by this import.

The package does without timm; this module alone needs it, and nothing here imports this module.
"""

from typing import Any

from torch import nn

try:
    from timm.models import build_model_with_cfg, register_model
    from timm.models.resnet import BasicBlock, Bottleneck, ResNet
except ImportError as error:
    raise ImportError("supcon_kernels.small_stem needs timm: pip install timm") from error

SMALL_STEM_DEPTHS: dict[int, tuple[Any, tuple[int, ...]]] = {
    10: (BasicBlock, (1, 1, 1, 1)),
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
    200: (Bottleneck, (3, 24, 36, 3)),
}


@register_model
def small_stem_resnet(
    pretrained: bool = False,
    *,
    pretrained_cfg: Any = None,
    depth: int = 18,
    width: int = 64,
    **options: Any,
) -> nn.Module:
    """timm's ResNet with a first convolution of 3x3 at stride 1 and no pooling after it.

    After `import supcon_kernels.small_stem`, timm.create_model builds it by this name, and loads
    what train/pretrain.py exported: `timm.create_model("local-dir:runs/NAME/export",
    pretrained=True)`.

    Args:
        pretrained: load the weights that `pretrained_cfg` names.
        pretrained_cfg: where weights are and what they were trained on, as timm passes it; there
            are none that come with the name.
        depth: one of SMALL_STEM_DEPTHS.
        width: channels of the first stage (before a bottleneck's expansion).
        options: of timm's ResNet, such as in_chans and num_classes.

    Raises:
        ValueError: there is no network of that depth.
    """
    if depth not in SMALL_STEM_DEPTHS:
        raise ValueError(f"depth must be one of {[*SMALL_STEM_DEPTHS]}, not {depth}")
    built: nn.Module = build_model_with_cfg(
        _build,
        "small_stem_resnet",
        pretrained,
        # Without a value of its own timm warns of a name with no configuration.
        pretrained_cfg=pretrained_cfg or {"first_conv": "conv1", "classifier": "fc"},
        depth=depth,
        width=width,
        **options,
    )
    return built


def _build(depth: int, width: int, **options: Any) -> nn.Module:
    block, layers = SMALL_STEM_DEPTHS[depth]
    channels = (width, 2 * width, 4 * width, 8 * width)
    network: Any = ResNet(block, layers, channels=channels, **options)
    stem = network.conv1
    assert isinstance(stem, nn.Conv2d)
    network.conv1 = nn.Conv2d(stem.in_channels, stem.out_channels, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    # Once more, for the new convolution.
    network.init_weights(**{key: options[key] for key in ("zero_init_last",) if key in options})
    built: nn.Module = network
    return built
