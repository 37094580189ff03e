"""How much memory one provider needs: its high-water mark in a process of its own.

`python -m measuring.peak_memory` measures itself and prints JSON; `measure_peak_mib` starts it.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from measuring.providers import Provider, make_provider
from measuring.workloads import Problem, Workload, make_problem

WARM_UP_ROWS = 64
MIB = 2**20
BENCHMARKS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class PeakMib:
    """Peaks above the inputs; the backward's includes what the forward kept for it."""

    forward: float
    backward: float
    both: float


def measure_peak_mib(provider_name: str, workload: Workload, num_threads: int) -> PeakMib:
    """Start a fresh process that runs the workload once and reports its peaks."""
    command = [sys.executable, "-m", "measuring.peak_memory", provider_name]
    # Every block of 64 KiB and more goes back to the system when freed, so that the mark shows
    # what is in use and not what the allocator keeps.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(64 * 1024)}
    paths = [str(BENCHMARKS), os.environ.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    child = subprocess.run(
        [*command, json.dumps(asdict(workload)), str(num_threads)],
        capture_output=True,
        text=True,
        env=environment,
    )
    if child.returncode != 0:
        raise RuntimeError(f"measuring memory of {provider_name} failed:\n{child.stderr}")
    return PeakMib(**json.loads(child.stdout.splitlines()[-1]))


class HighWaterMark:
    """The most memory in use since the last reset: of the CUDA allocator, or of this process."""

    def __init__(self, device: str) -> None:
        self.is_cuda = device == "cuda"

    def reset(self) -> None:
        gc.collect()
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")

    def read_mib(self) -> float:
        if self.is_cuda:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() / MIB
        if sys.platform == "linux":  # ru_maxrss starts at the parent's size there
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) / 1024
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB


def measure_own_peak_mib(provider: Provider, problem: Problem) -> PeakMib:
    """Run one step and read the mark after each half."""
    mark = HighWaterMark(problem.workload.device)
    mark.reset()
    inputs_mib = mark.read_mib()
    output = provider.forward(problem)
    forward_mib = mark.read_mib() - inputs_mib
    mark.reset()
    grads = provider.backward(problem, output)
    backward_mib = mark.read_mib() - inputs_mib
    del grads
    return PeakMib(forward_mib, backward_mib, max(forward_mib, backward_mib))


def main(provider_name: str, workload_json: str, num_threads: str) -> None:
    torch.set_num_threads(int(num_threads))
    workload = Workload(**json.loads(workload_json))
    provider = make_provider(provider_name, workload)
    # Warm up on few rows, so that libraries loaded on first use do not count; a provider that
    # compiles for each shape must do so at full size, or its compiler would count.
    warm_up = replace(
        workload, num_rows=WARM_UP_ROWS, num_cols=WARM_UP_ROWS if workload.num_cols else 0
    )
    provider.step(make_problem(workload if provider.compiles_per_shape else warm_up))
    print(json.dumps(asdict(measure_own_peak_mib(provider, make_problem(workload)))))


if __name__ == "__main__":
    main(*sys.argv[1:])
