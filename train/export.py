"""Export the encoder of a run to ONNX.

python train/export.py --checkpoint runs/NAME/last.pt --output encoder.onnx

The input `images` is (N, C, S, S) float32, normalised, with any N; the output `embeddings` is (N, D).
The file's metadata holds, as JSON: `resize_size` (of the shorter side) and `crop_size` (of the centre),
`mean` and `std` of pixels in [0, 1], and `classes`, the names of the classes of the run.
"""

import run.quiet_interrupt  # noqa: F401  before all that takes long to import

# isort: split

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from run.atomic_write import replace_file
from run.command_line import parse, run_script
from run.errors import UserError
from run.saved_run import open_run

DESCRIPTION = (__doc__ or "").split("\n", 1)[0]


@dataclass
class ExportOptions:
    """Exporting an encoder to ONNX.

    Args:
        checkpoint: A checkpoint of pretrain.py (last.pt, best.pt), or the folder of a run (its last.pt).
        output: The .onnx file to write.
    """

    checkpoint: str
    output: str

    def mistakes(self) -> list[str]:
        """What is out of range, one sentence each."""
        output = Path(self.output)
        rules = [
            (output.suffix == ".onnx", f"--output {output}: the name of an .onnx file is needed"),
            (output.parent.is_dir(), f"--output {output}: there is no folder {output.parent}"),
        ]
        return [sentence for holds, sentence in rules if not holds]


def main(argv: list[str] | None = None) -> Path:
    """Run what the command line asks for; returns the file written."""
    options = parse(ExportOptions, argv, prog="train/export.py", description=DESCRIPTION)
    return export(options)


def export(options: ExportOptions) -> Path:
    """Write the encoder whose weights the run would have evaluated."""
    run = open_run(Path(options.checkpoint))
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise UserError(f"ONNX needs more packages: pip install {' '.join(missing)}")
    about, size = run.prepared_images(), run.options.data.image_size
    assert size is not None
    encoder = run.network().encoder.eval()

    # Two images: a batch of one would be taken for a constant.
    example = torch.zeros(2, about["channels"], size, size)
    program = torch.onnx.export(
        encoder,
        (example,),
        dynamo=True,
        input_names=["images"],
        output_names=["embeddings"],
        dynamic_shapes=({0: torch.export.Dim("N")},),
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    metadata = {
        "resize_size": about["stored_size"],
        "crop_size": size,
        **{key: about[key] for key in ("mean", "std", "classes")},
    }
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=json.dumps(value))

    output = Path(options.output)
    try:
        replace_file(output, lambda file: file.write(proto.SerializeToString()))
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error}") from error
    print(f"encoder of {run.path} written to {output}")
    return output


if __name__ == "__main__":
    run_script(main)
