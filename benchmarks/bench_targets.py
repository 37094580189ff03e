"""What a step costs by what says which pairs are positive: integer labels, soft ones, a mask.

python benchmarks/bench_targets.py times forward and backward on the CPU, the kinds in turn, each
checked against the dense formula first, and writes targets_cpu_float32.csv. Beside the time stands
that of the processor, which other work on the machine does not lengthen (threads that wait do).
"""

from __future__ import annotations

import argparse
import sys
from statistics import median

import torch
from torch import Tensor

from measuring.machine import describe_machine
from measuring.stopwatch import time_in_turn
from measuring.workloads import ERROR_BOUND, SEED
from reporting.rows import add_output_options, results_path, write_table
from supcon_kernels import supcon_loss

RESULTS = "targets_cpu_float32.csv"
NUM_CLASSES = 10  # of integer labels, and of the mask
CHECKED_ROWS = 1024


def targets(num_rows: int, widths: list[int]) -> dict[str, dict[str, Tensor]]:
    """The arguments that say what is positive, by kind."""
    g = torch.Generator().manual_seed(SEED)
    labels = torch.randint(NUM_CLASSES, (num_rows,), generator=g)
    soft = {width: torch.randn(num_rows, width, generator=g).mul(2) for width in widths}
    return {
        "labels": {"labels": labels},
        **{f"soft {width}": {"labels": x.softmax(dim=1)} for width, x in soft.items()},
        "mask": {"mask": labels[:, None] == labels},
    }


def step(features: Tensor, backend: str, call: dict[str, object]) -> list[Tensor]:
    """The loss and its gradient."""
    leaf = features.detach().requires_grad_()
    loss = supcon_loss(leaf, backend=backend, **call)  # type: ignore[arg-type]
    return [loss.detach(), *torch.autograd.grad(loss, leaf)]


def check(features: Tensor, call: dict[str, object]) -> float:
    """The largest error, relative to the largest number, of a step against the float64 truth."""
    truth = step(features.double(), "reference", call)
    errors = [
        (got.double() - exact).abs().max() / exact.abs().max()
        for got, exact in zip(step(features, "native", call), truth)
    ]
    return max(error.item() for error in errors)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--num-rows", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[10, 100, 1000], help="soft classes"
    )
    parser.add_argument("--summation", choices=("out", "in"), default="out")
    denominators = ("all", "one_positive", "only_negatives")
    parser.add_argument("--denominator", choices=denominators, default="all")
    parser.add_argument("--rounds", type=int, default=9)
    add_output_options(parser)
    options = parser.parse_args(argv)
    machine = describe_machine("cpu")
    g = torch.Generator().manual_seed(SEED)
    features = torch.randn(options.num_rows, options.dim, generator=g)
    variant = {"summation": options.summation, "denominator": options.denominator}
    num_checked = min(CHECKED_ROWS, options.num_rows)
    for kind, target in targets(num_checked, options.widths).items():
        error = check(features[:num_checked], target | variant)
        if not error <= ERROR_BOUND["float32"]:
            print(f"{kind}: the error is {error:.1e}")
            return 1
    calls = {k: t | variant for k, t in targets(options.num_rows, options.widths).items()}
    steps = {k: lambda call=call: step(features, "native", call) for k, call in calls.items()}
    times = time_in_turn(steps, options.rounds)
    rows = []
    for kind in calls:
        row = {"num_rows": options.num_rows, "dim": options.dim, **variant, "targets": kind}
        row |= {"num_samples": options.rounds}
        for name, samples, of_labels in zip(("time", "processor"), times[kind], times["labels"]):
            row[f"{name}_ms"] = median(samples)
            row[f"{name}_over_labels"] = median(a / b for a, b in zip(samples, of_labels))
        print(
            f"{kind:10} {row['time_ms']:9.1f} ms, {row['time_over_labels']:.2f} of integer labels; "
            f"processor {row['processor_ms']:9.1f} ms, {row['processor_over_labels']:.2f}"
        )
        rows.append(row | machine)
    write_table(results_path(RESULTS, options.output_dir, options.update), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
