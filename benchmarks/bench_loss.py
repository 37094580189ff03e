"""Time and peak memory of the supervised contrastive loss: forward, backward, and both.

All providers take turns in one run on the same inputs; one that is wrong gets no speed.
Writes a table, a CSV and a picture: python benchmarks/bench_loss.py --help
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import quantiles

import torch

from measuring.admission import admit
from measuring.machine import describe_machine
from measuring.peak_memory import PeakMib, measure_own_peak_mib, measure_peak_mib
from measuring.providers import FACTORIES, OURS, provider_names
from measuring.results import Report, Result, rate_against_peak
from measuring.stopwatch import PHASES, Samples, measure_peak, time_interleaved
from measuring.workloads import (
    ERROR_BOUND,
    Workload,
    compute_truth,
    make_checked_problem,
    make_problem,
)
from reporting.loss import full_table
from reporting.rows import add_output_options, ints, names, read_report, results_path, write_report

DEFAULT_SIZES = (256, 512, 1024, 2048, 4096, 8192)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, or take a former run's rows, and print them."""
    parser = _make_parser()
    args = parser.parse_args(argv)
    _refuse_contradictions(parser, args)
    name = args.name or f"loss_{args.device}_{args.dtype}"
    if args.table:
        if not args.table.exists():
            parser.error(f"there is no {args.table}")
        report = read_report(args.table)
    else:
        report = run(args)
        save(report, results_path(f"{name}.csv", args.output_dir, args.update))
    print(full_table(report, args.markdown))
    return 1 if any(result.status in ("wrong", "failed") for result in report.results) else 0


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    call = parser.add_argument_group("the call that is measured")
    call.add_argument("--sizes", type=ints, default=DEFAULT_SIZES, help="rows N, as 256,512")
    call.add_argument("--dim", type=int, default=Workload.dim)
    call.add_argument("--num-cols", type=int, default=0, help="contrast with M other rows")
    call.add_argument("--classes", type=int, default=Workload.num_classes)
    call.add_argument("--temperature", type=float, default=Workload.temperature)
    call.add_argument("--summation", choices=("out", "in"), default="out")
    denominators = ("all", "one_positive", "only_negatives")
    call.add_argument("--denominator", choices=denominators, default="all")
    call.add_argument("--dtype", choices=tuple(ERROR_BOUND), default="float32")
    call.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    how = parser.add_argument_group("how it is measured")
    how.add_argument("--providers", type=names, help="as dense,matmuls; None: all that are here")
    how.add_argument("--seconds", type=float, default=10.0, help="time budget of each size")
    how.add_argument("--threads", type=int, default=torch.get_num_threads())
    how.add_argument("--no-memory", action="store_true", help="measure time only")
    out = parser.add_argument_group("what becomes of it")
    out.add_argument("--name", help="of the CSV and the PNG; None: loss_DEVICE_DTYPE")
    add_output_options(out)
    out.add_argument("--markdown", action="store_true", help="print the table as markdown")
    out.add_argument("--table", type=Path, metavar="CSV", help="measure nothing, show this file")
    return parser


def _refuse_contradictions(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    smallest = min((*args.sizes, args.num_cols) if args.num_cols else args.sizes)
    if smallest < 2 * args.classes:
        parser.error(f"{args.classes} classes need at least {2 * args.classes} rows")
    for name in args.providers or ():
        if name not in FACTORIES and not name.startswith(OURS):
            parser.error(f"no provider {name!r}; known here: {', '.join(provider_names())}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")


def run(args: argparse.Namespace) -> Report:
    """Measure every size; the machine's peak is sought before each, and its best counts."""
    torch.set_num_threads(args.threads)
    machine = describe_machine(args.device)
    if float(machine["load_at_start"]) > 0.5:
        _say(f"this machine is busy (load {machine['load_at_start']}): times will be too high")
    names = args.providers or provider_names()
    results: list[Result] = []
    peaks: list[tuple[float, str]] = []
    for num_rows in args.sizes:
        workload = Workload(
            num_rows=num_rows,
            dim=args.dim,
            num_cols=args.num_cols,
            num_classes=args.classes,
            temperature=args.temperature,
            summation=args.summation,
            denominator=args.denominator,
            dtype=args.dtype,
            device=args.device,
        )
        peaks.append(measure_peak(workload.torch_dtype, args.device))
        results += bench_size(workload, names, args.seconds, with_memory=not args.no_memory)
    gflops, source = max(peaks)
    _say(f"{source} of this machine: {gflops:.0f} GFLOP/s in {args.dtype}")
    return Report(rate_against_peak(results, gflops, source), machine)


def bench_size(
    workload: Workload, names: Sequence[str], budget_s: float, with_memory: bool
) -> list[Result]:
    """Check every provider, then time those that are right, then measure their memory."""
    _say(f"N={workload.num_rows}: checking {', '.join(names)}")
    checked = make_checked_problem(workload)
    truth = compute_truth(checked)
    admissions = {name: admit(name, workload, checked, truth) for name in names}
    right = {name: a.provider for name, a in admissions.items() if a.provider}
    _say(f"N={workload.num_rows}: timing {', '.join(right) or 'none of them'}")
    problem = make_problem(workload)
    samples = time_interleaved(list(right.values()), problem, budget_s)
    results = []
    for name, admission in admissions.items():
        if name not in right:
            results.append(admission.verdict)
            continue
        peak = None
        if with_memory:
            _say(f"N={workload.num_rows}: memory of {name}")
            if workload.device == "cuda":  # the allocator keeps its own mark, apart from libraries
                peak = measure_own_peak_mib(right[name], problem)
            else:
                peak = measure_peak_mib(name, workload, torch.get_num_threads())
        results += [_summarise(admission.verdict, p, samples[name], peak) for p in PHASES]
    return results


def _summarise(verdict: Result, phase: str, samples: Samples, peak: PeakMib | None) -> Result:
    times_ms = getattr(samples, phase)
    q25_ms, median_ms, q75_ms = quantiles(times_ms, n=4, method="inclusive")
    return replace(
        verdict,
        phase=phase,
        time_ms=median_ms,
        time_q25_ms=q25_ms,
        time_q75_ms=q75_ms,
        num_samples=len(times_ms),
        peak_mib=getattr(peak, phase) if peak else None,
    )


def save(report: Report, csv_path: Path) -> None:
    write_report(report, csv_path)
    if any(result.time_ms for result in report.results):
        try:
            from reporting.picture import draw_picture
        except ModuleNotFoundError:
            _say("no picture: pip install matplotlib")
            return
        draw_picture(report, csv_path.with_suffix(".png"))
        _say(f"wrote {csv_path.with_suffix('.png')}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
