"""What both directions of CLIP's loss cost: in one call, in two, and by a matrix of logits.

One call is also timed with a mask, and with denominator="one_positive": the loss is the same.

python benchmarks/bench_both_ways.py times forward and backward on the CPU, the ways in turn, each
checked against the dense formula first, and writes both_ways_cpu_float32.csv.
"""

from __future__ import annotations

import argparse
import sys
from statistics import median

import torch
from torch import Tensor

from measuring.both_ways import VARIANTS, WAYS, LossOfSides, by_logits
from measuring.machine import describe_machine
from measuring.stopwatch import time_in_turn
from measuring.workloads import ERROR_BOUND, SEED
from reporting.rows import add_output_options, results_path, write_table

RESULTS = "both_ways_cpu_float32.csv"
CHECKED_ROWS = 1024


def step(loss_of: LossOfSides, sides: Tensor) -> list[Tensor]:
    """The loss and the gradients of both sides."""
    leaves = [side.detach().requires_grad_() for side in sides]
    loss = loss_of(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def check(loss_of: LossOfSides, sides: Tensor) -> float:
    """The largest error, relative to the largest number, of a step against the float64 truth."""
    pairs = zip(step(loss_of, sides), step(by_logits, sides.double()))
    errors = [(got.double() - exact).abs().max() / exact.abs().max() for got, exact in pairs]
    return max(error.item() for error in errors)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--num-rows", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    add_output_options(parser)
    options = parser.parse_args(argv)
    machine = describe_machine("cpu")
    g = torch.Generator().manual_seed(SEED)
    sides = torch.randn(2, options.num_rows, options.dim, generator=g)
    ways = WAYS | VARIANTS
    for name, loss_of in ways.items():
        error = check(loss_of, sides[:, :CHECKED_ROWS])
        if not error <= ERROR_BOUND["float32"]:
            print(f"{name}: the error is {error:.1e}")
            return 1
    steps = {name: lambda way=way: step(way, sides) for name, way in ways.items()}
    times = time_in_turn(steps, options.rounds)
    rows = []
    for name, of_way in times.items():
        row = {"num_rows": options.num_rows, "dim": options.dim, "both_directions": name}
        row |= {"num_samples": options.rounds}
        for clock, samples, of_one in zip(("time", "processor"), of_way, times["one call"]):
            row[f"{clock}_ms"] = median(samples)
            row[f"{clock}_over_one_call"] = median(a / b for a, b in zip(samples, of_one))
        print(
            f"{name:22} {row['time_ms']:9.1f} ms, {row['time_over_one_call']:.2f} of one call; "
            f"processor {row['processor_ms']:9.1f} ms, {row['processor_over_one_call']:.2f}"
        )
        rows.append(row | machine)
    write_table(results_path(RESULTS, options.output_dir, options.update), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
