"""Evaluate runs as a paper's comparison does: accuracy, calibration, corruptions, retrieval, transfer.

python train/evaluate.py --checkpoint runs/NAME
python train/evaluate.py --checkpoint runs/A runs/B --baseline runs/A --transfer cifar10
torchrun --nproc-per-node 8 train/evaluate.py ...

Writes evaluation.json and evaluation.png to the folder of each run. For several runs it also writes the table
comparison.md and comparison.csv. Checkpoints are not changed. Only the corruptions are random, and they are
the same for every run.
"""

import run.quiet_interrupt  # noqa: F401  before all that takes long to import

# isort: split

from pathlib import Path

from evaluation.options import EvaluateOptions
from run.command_line import parse, run_script
from run.device import DeviceOptions, pick_device, set_arithmetic
from run.extras import require_extra
from run.processes import joined, local_rank_0_speaks

DESCRIPTION = (__doc__ or "").split("\n", 1)[0]


def main(argv: list[str] | None = None) -> list[Path]:
    """Run what the command line asks for; returns the JSON file of each run."""
    with local_rank_0_speaks():
        options = parse(EvaluateOptions, argv, prog="train/evaluate.py", description=DESCRIPTION)
        require_extra("evaluate", "torchmetrics", "pytorch_metric_learning", "imagecorruptions")
        device = pick_device(options.device)
    # What it imports is in that extra.
    from evaluation.runs import evaluate

    with joined(device, timeout_minutes=options.timeout_minutes) as ranks:
        # The same for all runs, whatever each was trained by.
        set_arithmetic(DeviceOptions(), device)
        return evaluate(options, ranks.own_device(device), ranks)


if __name__ == "__main__":
    run_script(main, if_interrupted="(the same command goes on with what is not finished)")
