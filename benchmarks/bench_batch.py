"""The largest batch whose loss and gradient fit in a given memory, for each provider.

python benchmarks/bench_batch.py writes batch_cpu_float32.csv. The peak of a step, above its inputs, is
measured in a process of its own. The number of rows doubles until it no longer fits; three halvings of
what is left then find the largest to within a twelfth.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace

import torch

from measuring.machine import describe_machine
from measuring.peak_memory import measure_peak_mib
from measuring.providers import OURS
from measuring.workloads import Workload
from reporting.rows import add_output_options, results_path, write_table

PROVIDERS = ("dense", "dense-compiled", "pytorch-metric-learning", f"{OURS}native]")
FIRST_ROWS = 1024
STEP = 256
"""Rows are multiples of it."""


@dataclass(frozen=True)
class Found:
    """The largest batch that fits, and the least that was tried and did not."""

    fits: int
    too_large: int
    peak_mib: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget-mib", type=float, default=128.0, help="above the inputs")
    parser.add_argument("--dim", type=int, default=Workload.dim)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_output_options(parser)
    args = parser.parse_args()
    machine = describe_machine("cpu")
    rows = []
    for provider in PROVIDERS:
        began = time.monotonic()
        found = largest_batch(
            provider, Workload(FIRST_ROWS, args.dim), args.budget_mib, args.threads
        )
        rows.append(
            {
                "provider": provider,
                "budget_mib": args.budget_mib,
                "dim": args.dim,
                "largest_rows": found.fits,
                "too_many_rows": found.too_large,
                "peak_mib": found.peak_mib,
            }
            | machine
        )
        print(f"{provider}: {found.fits} rows ({time.monotonic() - began:.0f} s)", file=sys.stderr)
    write_table(results_path("batch_cpu_float32.csv", args.output_dir, args.update), rows)


def largest_batch(provider: str, workload: Workload, budget_mib: float, threads: int) -> Found:
    """Try sizes until the largest that fits is known to within a twelfth."""

    def tried(num_rows: int, found: Found) -> Found:
        peak = measure_peak_mib(provider, replace(workload, num_rows=num_rows), threads).both
        if peak <= budget_mib:
            return replace(found, fits=num_rows, peak_mib=peak)
        return replace(found, too_large=num_rows)

    found = tried(FIRST_ROWS, Found(0, 0, 0.0))
    while not found.too_large:
        found = tried(2 * found.fits, found)
    for _ in range(3):
        found = tried((found.fits + found.too_large) // 2 // STEP * STEP, found)
    return found


if __name__ == "__main__":
    main()
