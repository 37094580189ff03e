"""Convert a checkpoint of the SupContrast repository to an encoder that --init_from takes.

python train/convert.py --supcontrast ckpt_epoch_1000.pth --output encoder.safetensors

Its ResNet is timm's with our small stem: the same layers under other names. The head is left out.
"""

import run.quiet_interrupt  # noqa: F401  before all that takes long to import

# isort: split

import re
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor

from network.weights import PREFIX, load_weights, pack_encoder
from run.atomic_write import replace_file
from run.checkpoint import check_finite
from run.command_line import parse, run_script
from run.errors import UserError
from run.rules import broken
from supcon_kernels.small_stem import SMALL_STEM_DEPTHS

MODEL = "small_stem_resnet"
DESCRIPTION = (__doc__ or "").split("\n", 1)[0]


@dataclass
class ConvertOptions:
    """The conversion.

    Args:
        supcontrast: A checkpoint of github.com/HobbitLong/SupContrast, such as ckpt_epoch_1000.pth,
            with a ResNet of its networks/resnet_big.py.
        output: The .safetensors file to write, which --init_from takes.
        trust: Unpickle whatever the file holds, which may run any code. Without it only tensors, plain
            values and the options of SupContrast are read, which its own checkpoints consist of.
    """

    supcontrast: str
    output: str
    trust: bool = False

    def mistakes(self) -> list[str]:
        """What is out of range, one sentence each."""
        output = Path(self.output)
        rules = [
            (
                Path(self.supcontrast).is_file(),
                f"--supcontrast {self.supcontrast}: there is no such file",
            ),
            (
                output.suffix == ".safetensors",
                f"--output {output}: the name of a .safetensors file is needed",
            ),
            (output.parent.is_dir(), f"--output {output}: there is no folder {output.parent}"),
        ]
        return broken(rules)


def main(argv: list[str] | None = None) -> Path:
    """Run what the command line asks for; returns the file written."""
    options = parse(ConvertOptions, argv, prog="train/convert.py", description=DESCRIPTION)
    path, output = Path(options.supcontrast), Path(options.output)
    weights = read_supcontrast(path, trust=options.trust)
    arguments = describe_encoder(path, weights)
    load_weights(timm.create_model(MODEL, **arguments), weights, path)
    packed = pack_encoder(weights, {"model": MODEL, "options": arguments})
    try:
        replace_file(output, lambda file: file.write(packed))
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error}") from error
    print(
        f"encoder written to {output}; to start from it: python train/pretrain.py --init_from "
        f"{output} --model resnet{arguments['depth']} --width {arguments['width']} "
        f"--in_chans {arguments['in_chans']} (and the --mean and --std that it was trained with)"
    )
    return output


def read_supcontrast(path: Path, *, trust: bool) -> dict[str, Tensor]:
    """The weights of the encoder in a checkpoint of SupContrast, under timm's names.

    Args:
        trust: unpickle whatever the file holds, which may run code; else tensors, plain values and
            the argparse.Namespace of its options alone.

    Raises:
        UserError: it cannot be read, holds anything else without `trust`, or has no such encoder.
    """
    try:
        with torch.serialization.safe_globals([Namespace]):
            saved = torch.load(path, map_location="cpu", weights_only=not trust)
    except UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"--supcontrast {path} holds more than weights and options"
            f"{f' ({code[1]})' if code else ''}: with --trust it is read all the same, and may run "
            "any code; give that to a file alone whose makers you trust"
        ) from error
    except Exception as error:  # of whatever it unpickles
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"--supcontrast {path} cannot be read: {reason}") from error
    model = saved.get("model") if isinstance(saved, dict) else None
    # Of DataParallel, around the encoder or around the whole.
    model = model if isinstance(model, dict) else {}
    named = {str(key).replace("module.", ""): value for key, value in model.items()}
    weights = {
        # Named as in timm's BasicBlock and Bottleneck.
        key.removeprefix(PREFIX).replace(".shortcut.", ".downsample."): value
        for key, value in named.items()
        if key.startswith(PREFIX)
    }
    if not weights:
        raise UserError(f"--supcontrast {path} has no weights encoder.* under 'model'")
    try:
        check_finite(weights)
    except ValueError as error:
        raise UserError(f"--supcontrast {path}: {error}") from error
    return weights


def describe_encoder(path: Path, weights: dict[str, Tensor]) -> dict[str, Any]:
    """The options from which timm.create_model builds the small-stem ResNet of some weights.

    Raises:
        UserError: there is no such network.
    """
    blocks = {tuple(name.split(".")[:2]) for name in weights if name.startswith("layer")}
    lengths = tuple(sum(layer == f"layer{k}" for layer, _ in blocks) for k in (1, 2, 3, 4))
    block = Bottleneck if "layer1.0.conv3.weight" in weights else BasicBlock
    depths = [depth for depth, built in SMALL_STEM_DEPTHS.items() if built == (block, lengths)]
    stem = weights.get("conv1.weight")
    if not depths or stem is None or "layer1.0.bn1.weight" not in weights:
        raise UserError(f"--supcontrast {path} holds no ResNet of networks/resnet_big.py")
    return {
        "in_chans": stem.shape[1],
        "num_classes": 0,
        "depth": depths[0],
        "width": len(weights["layer1.0.bn1.weight"]),
    }


if __name__ == "__main__":
    run_script(main)
