"""Where the time of a small batch goes: the core alone, then each layer that a call has around it.

python benchmarks/bench_overhead.py writes overhead_cpu_float32.csv. All layers
take turns in one run; a layer's time holds those of the layers below it. With --gpu-host it writes
overhead_gpu_host.csv: the host's part of a call of the Triton backend, its launches included, with a
driver that does nothing in the place of a GPU's.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from measuring import stub_driver
from measuring.machine import describe_machine
from measuring.stopwatch import elapsed_ms, fma_peak_gflops
from reporting.rows import add_output_options, results_path, write_table
from supcon_kernels import op, supcon_loss, triton_call
from supcon_kernels.backends import native, triton
from supcon_kernels.backends.protocol import Anchors, Wanted
from supcon_kernels.problem import Problem
from supcon_kernels.triton_tiles import Target

RESULTS = "overhead_cpu_float32.csv"
SIZES = (4, 256, 512, 1024, 2048)
GPU_RESULTS = "overhead_gpu_host.csv"
BEGIN, END = "<!-- bench_overhead:begin -->", "<!-- bench_overhead:end -->"


def layers(num_rows: int, dim: int) -> dict[str, Callable[[], object]]:
    """A forward and a backward, by the layer that is called."""
    g = torch.Generator().manual_seed(0)
    features = torch.randn(num_rows, dim, generator=g)
    labels = torch.randint(10, (num_rows,), generator=g)
    problem = Problem(features, None, labels, None, None, None, 0.1, 0, "out", "all", True, -100)
    leaf = features.clone().requires_grad_()
    of_leaf = dataclasses.replace(problem, rows=leaf)
    wanted = Wanted(rows=True)
    loss, gradient = torch.empty(()), torch.empty_like(features)
    call = native._call(problem)

    def core() -> None:
        call.loss_and_gradients("mean", loss.data_ptr(), gradient.data_ptr(), 0, 0)

    def backend() -> None:
        native.loss_and_gradients(problem, "mean", wanted)

    def autograd() -> None:
        torch.autograd.grad(op.loss_of(of_leaf, "native", "mean"), leaf)

    def whole() -> None:
        torch.autograd.grad(supcon_loss(leaf, labels, temperature=0.1), leaf)

    return {
        "core": core,
        "backend": backend,
        "autograd": autograd,
        "supcon_loss": whole,
    }


def gpu_layers(num_rows: int, dim: int) -> dict[str, Callable[[], object]]:
    """As ``layers``, of the Triton backend for an H100 that is not there."""
    stub_driver.install()
    triton_call._target = lambda device: Target(90, stub_driver.NUM_MULTIPROCESSORS)
    triton.why_not = lambda problem: None
    triton.unavailable = lambda: None
    features = torch.zeros(num_rows, dim, dtype=torch.bfloat16)
    labels = torch.zeros(num_rows, dtype=torch.int64)
    problem = Problem(features, None, labels, None, None, None, 0.1, 0, "out", "all", True, -100)
    leaf, one = features.clone().requires_grad_(), torch.ones(())
    operands = (*problem.operands(), "triton", "mean")
    wanted = Wanted(rows=True)

    def backend() -> None:
        found = triton.forward(problem, "mean")
        anchors = Anchors(one, found.divisor, found.stats, found.prepared)
        triton.backward(problem, anchors, None, wanted)

    def operator() -> None:
        found = op.results_of(problem, "triton", "mean")
        anchors = Anchors(one, found.divisor, found.stats, found.prepared)
        op.gradients_of(problem, anchors, None, wanted, "triton")

    def autograd() -> None:
        torch.autograd.grad(op.forward(leaf, *operands[1:])[0], leaf)

    def whole() -> None:
        torch.autograd.grad(supcon_loss(leaf, labels, temperature=0.1, backend="triton"), leaf)

    return {"backend": backend, "operator": operator, "autograd": autograd, "supcon_loss": whole}


def measure(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median microseconds of each layer, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            times[name].append(1e3 * elapsed_ms("cpu", call)[0])
    return {name: median(of) for name, of in times.items()}


def table(rows: list[dict[str, str]]) -> str:
    """Microseconds by size and layer, as markdown."""
    names = [key.removesuffix("_us") for key in rows[0] if key.endswith("_us")]
    lines = [
        f"| N | {' | '.join(names)} | share of peak, core alone | all |",
        "|---" * (len(names) + 3) + "|",
    ]
    for row in rows:
        times = " | ".join(row[f"{name}_us"] for name in names)
        shares = " | ".join(f"{100 * float(row[k]):.0f} %" for k in ("core_share", "whole_share"))
        lines.append(f"| {row['num_rows']} | {times} | {shares} |")
    first = rows[0]
    about = (
        f"Forward and backward in µs, median; D={first['dim']}, float32, {first['num_threads']} threads "
        f"of {first['cpu']}, peak {float(first['peak_gflops']):.0f} GFLOP/s."
    )
    return f"{about}\n\n" + "\n".join(lines)


def measure_gpu_host(path: Path, dim: int, rounds: int) -> int:
    """Write and show the one row: the host's time does not depend on the number of rows."""
    machine = describe_machine("cpu")
    times = measure(gpu_layers(256, dim), rounds)
    row: dict[str, object] = {"num_rows": 256, "dim": dim}
    row |= {f"{k}_us": f"{us:.0f}" for k, us in times.items()}
    write_table(path, [row | machine])
    print(row)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=400)
    add_output_options(parser)
    parser.add_argument(
        "--table", action="store_true", help="measure nothing, show the committed rows"
    )
    parser.add_argument("--update-docs", type=Path, metavar="DOC", help="replace its block")
    parser.add_argument(
        "--gpu-host", action="store_true", help="measure the host's part of a call on a GPU instead"
    )
    options = parser.parse_args()
    if options.update_docs and not (options.update or options.table):
        parser.error("--update-docs needs --update, whose rows it shows, or --table")
    if options.gpu_host:
        path = results_path(GPU_RESULTS, options.output_dir, options.update)
        return measure_gpu_host(path, options.dim, options.rounds)
    path = results_path(RESULTS, options.output_dir, options.update or options.table)
    if not options.table:
        machine = describe_machine("cpu")
        peaks, times_of = [], {}
        for n in SIZES:
            peaks.append(fma_peak_gflops(torch.float32, "cpu"))
            times_of[n] = measure(
                layers(n, options.dim), max(20, options.rounds * 256 // max(n, 256))
            )
        peak = max(peaks)
        measured = []
        for n, times in times_of.items():
            useful = 4e-3 * n * n * options.dim  # thousand FLOP, as a GFLOP/s is a thousand a µs
            measured.append(
                {"num_rows": n, "dim": options.dim}
                | {f"{name}_us": f"{us:.0f}" for name, us in times.items()}
                | {"core_share": f"{useful / times['core'] / peak:.4f}"}
                | {"whole_share": f"{useful / times['supcon_loss'] / peak:.4f}"}
                | {"peak_gflops": f"{peak:.1f}"}
                | machine
            )
        write_table(path, measured)
    with open(path, newline="") as file:
        shown = table(list(csv.DictReader(file)))
    print(shown)
    if options.update_docs:
        text = options.update_docs.read_text()
        head, tail = text.split(BEGIN)[0], text.split(END)[1]
        options.update_docs.write_text(f"{head}{BEGIN}\n{shown}\n{END}{tail}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
