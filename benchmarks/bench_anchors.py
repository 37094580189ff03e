"""A few anchors against a million contrasts without a gradient: time and memory of a step.

python benchmarks/bench_anchors.py writes anchors_cpu_float32.csv. Each row is measured in a process of
its own, ours after it was checked against the matrix of logits on fewer contrasts. The peak is above
the inputs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from measuring.machine import describe_machine
from measuring.peak_memory import HighWaterMark
from measuring.workloads import ERROR_BOUND, SEED
from reporting.rows import add_output_options, ints, results_path, write_table
from supcon_kernels import supcon_loss

RESULTS = "anchors_cpu_float32.csv"
NUM_CLASSES, TEMPERATURE, CHECKED_COLS = 1000, 0.1, 8192

# Anchors and contrasts, and the labels of both.
Sides = tuple[Tensor, Tensor, Tensor, Tensor]


def by_kernel(rows: Tensor, cols: Tensor, of_rows: Tensor, of_cols: Tensor) -> Tensor:
    """The loss by ``supcon_loss``."""
    return supcon_loss(
        rows,
        of_rows,
        contrast_features=cols,
        contrast_labels=of_cols,
        temperature=TEMPERATURE,
        backend="native",
    )


def by_logits(rows: Tensor, cols: Tensor, of_rows: Tensor, of_cols: Tensor) -> Tensor:
    """The loss in plain PyTorch, with the matrix of all logits."""
    logits = F.normalize(rows) @ F.normalize(cols).T / TEMPERATURE
    same = of_rows[:, None] == of_cols
    counts = same.sum(1)
    losses = logits.logsumexp(1) - (logits * same).sum(1) / counts
    return losses[counts > 0].sum() / len(rows)


WAYS: dict[str, Callable[..., Tensor]] = {"native": by_kernel, "matrix of logits": by_logits}


def make_sides(num_rows: int, num_cols: int, dim: int) -> Sides:
    g = torch.Generator().manual_seed(SEED)
    sizes = num_rows, num_cols
    rows, cols = (torch.randn(n, dim, generator=g) for n in sizes)
    of_rows, of_cols = (torch.randint(NUM_CLASSES, (n,), generator=g) for n in sizes)
    return rows, cols, of_rows, of_cols


def step(loss_of: Callable[..., Tensor], sides: Sides) -> list[Tensor]:
    """The loss and the anchors' gradient."""
    rows = sides[0].detach().requires_grad_()
    loss = loss_of(rows, *sides[1:])
    return [loss.detach(), *torch.autograd.grad(loss, rows)]


def check(num_rows: int, dim: int) -> float:
    """The largest error, relative to the largest number, of our step against the float64 truth."""
    sides = make_sides(num_rows, CHECKED_COLS, dim)
    exact = step(by_logits, (sides[0].double(), sides[1].double(), *sides[2:]))
    pairs = zip(step(by_kernel, sides), exact)
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def measure(way: str, num_rows: int, num_cols: int, dim: int, rounds: int) -> dict[str, float]:
    """The median time of a step and its peak, in this process."""
    step(WAYS[way], make_sides(num_rows, 64, dim))  # libraries loaded on first use do not count
    sides, mark = make_sides(num_rows, num_cols, dim), HighWaterMark("cpu")
    mark.reset()
    before, times = mark.read_mib(), []
    for _ in range(rounds):
        began = perf_counter()
        step(WAYS[way], sides)
        times.append(1e3 * (perf_counter() - began))
    return {"time_ms": median(times), "peak_mib": mark.read_mib() - before}


def measure_apart(*arguments: str | int) -> dict[str, float]:
    """``measure`` in a process of its own."""
    command = [sys.executable, __file__, "--measure", json.dumps(arguments)]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(child.stdout)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--sizes", type=ints, default=(8, 64, 256), help="anchors, as 8,64")
    parser.add_argument("--num-cols", type=int, default=1_000_000, help="contrasts")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    add_output_options(parser)
    options = parser.parse_args(argv)
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return 0
    machine, rows = describe_machine("cpu"), []
    for num_rows in options.sizes:
        error = check(num_rows, options.dim)
        if not error <= ERROR_BOUND["float32"]:
            print(f"{num_rows} anchors: the error is {error:.1e}")
            return 1
        for way in WAYS:
            size = {"num_rows": num_rows, "num_cols": options.num_cols, "dim": options.dim}
            found = measure_apart(way, *size.values(), options.rounds)
            print(f"{num_rows:4} {way:16} {found['time_ms']:8.0f} ms {found['peak_mib']:8.0f} MiB")
            rows.append(size | {"way": way, "num_samples": options.rounds} | found | machine)
    write_table(results_path(RESULTS, options.output_dir, options.update), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
