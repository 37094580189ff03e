"""What the pair kernels keep busy, where Nsight Compute is installed: units, issue, L2, stalls.

Whole sections are asked for and read by pattern, as counters have other names on other chips. The
card's clocks are left alone.
"""

from __future__ import annotations

import csv
import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from gpu.backend import PAIR_KERNELS
from gpu.place import Items, Place, Row, Skipped
from measuring.workloads import Workload, make_problem
from supcon_kernels import supcon_loss

NUM_ROWS = (8192, 32768)
SECTIONS = (
    *("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis"),
    *(
        "MemoryWorkloadAnalysis_Tables",
        "SchedulerStats",
        "WarpStateStats",
        "LaunchStats",
        "Occupancy",
    ),
)
WANTED = re.compile(
    r"pipe_(tensor|xu|fma|alu|lsu)|inst_(issued|executed)|issue_active|issues_active|lts__t_(bytes|sectors)"
    r"|dram__(bytes|throughput)|issue_stalled|registers|occupancy|gpu__time_duration|shared_mem"
)
STEPS = 2


def items(place: Place) -> Items:
    place.needs_cuda()
    return {f"N={n}": functools.partial(_count, n) for n in NUM_ROWS}


def _count(num_rows: int) -> Iterator[Row]:
    ncu = find_tool("ncu")
    command = [ncu, "--clock-control", "none", "--csv", "--page", "raw"]
    for section in SECTIONS:
        command += ["--section", section]
    names = "|".join(PAIR_KERNELS.values())
    # The last step's: what comes before it warms up.
    skip = len(PAIR_KERNELS) * (STEPS - 1)
    command += ["--kernel-name", f"regex:^({names})", "--launch-skip", str(skip)]
    script = f"from gpu.counters import probe; probe({num_rows})"
    command += [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = list(read_counters(done.stdout))
    if not rows:
        lines = (done.stdout + done.stderr).strip().splitlines()[-6:]
        raise RuntimeError("ncu counted nothing: " + " / ".join(lines))
    for row in rows:
        yield {"num_rows": num_rows, **row}


def find_tool(name: str) -> str:
    """Where a tool of CUDA's is."""
    found = shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")
    if found is None:
        raise Skipped(f"{name} is not installed")
    return str(Path(found))


def probe(num_rows: int) -> None:
    """What is looked at: a few steps."""
    problem = make_problem(Workload(num_rows, dtype="bfloat16", device="cuda"))
    for _ in range(STEPS):
        loss = supcon_loss(problem.features, problem.labels, temperature=0.1, backend="triton")
        torch.autograd.grad(loss, problem.features)
    torch.cuda.synchronize()


def read_counters(text: str) -> Iterator[Row]:
    """One row a kernel of ncu's CSV: a header, a line of units, then kernels."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    reader = csv.DictReader(lines)
    units: dict[str, str] = {}
    for record in reader:
        if not record.get("ID"):
            units = record
            continue
        counters = {
            f"{name} [{units.get(name) or ''}]": _number(value)
            for name, value in record.items()
            if name and value and WANTED.search(name)
        }
        yield {"kernel": record.get("Kernel Name"), "counters": counters}


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text
