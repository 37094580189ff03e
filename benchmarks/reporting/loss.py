"""The rows of bench_loss.py as tables: the full one that it prints, and those of documents."""

from __future__ import annotations

from measuring.providers import OURS
from measuring.results import UNTIMED, Report, Result
from measuring.workloads import worst
from reporting.documents import render_table


def full_table(report: Report, markdown: bool) -> str:
    """Every provider at every size: times with quartiles, ratio, share of peak, memory, error."""
    header = ["provider", "N", "forward ms", "backward ms", "both ms", "quartiles"]
    header += ["× dense", "share of peak", "peak MiB", "error"]
    cells = [header]
    for num_rows in report.sizes:
        for provider in report.providers:
            if result := report.find(num_rows, provider, "both"):
                cells.append([provider, str(num_rows), *_full_cells(report, result)])
    return "\n".join([render_table(cells, markdown), *(f"\n{note}" for note in report.notes)])


def _full_cells(report: Report, both: Result) -> list[str]:
    if both.status in UNTIMED:
        return [*[""] * 2, both.verdict, *[""] * 5]
    halves = [report.find(both.num_rows, both.provider, half) for half in ("forward", "backward")]
    dense = report.find(both.num_rows, "dense", "both")
    dense_ms = dense.time_ms if dense else None
    return [
        *(_digits(half.time_ms if half else None) for half in halves),
        _digits(both.time_ms),
        f"{_digits(both.time_q25_ms)}–{_digits(both.time_q75_ms)}",
        f"{dense_ms / both.time_ms:.2f}" if dense_ms and both.time_ms else "",
        _percent(both.peak_share),
        _digits(both.peak_mib),
        f"{worst(both.errors):.1e}" if both.errors else both.note,
    ]


def time_and_memory(report: Report, picture: str) -> str:
    """For documents: what was run, one table of times, one of memory, the picture."""
    ours = [name for name in report.providers if name.startswith(OURS)]
    time_cells = [
        [
            "N",
            *report.providers,
            *(f"{name.removeprefix(OURS[:-1])} share of peak" for name in ours),
        ]
    ]
    memory_cells = [["N", *report.providers]]
    for num_rows in report.sizes:
        found = [report.find(num_rows, name, "both") for name in report.providers]
        shares = [r.peak_share if r else None for r in found if r and r.provider in ours]
        time_cells.append([str(num_rows), *map(_time_cell, found), *map(_percent, shares)])
        memory_cells.append([str(num_rows), *(_digits(r.peak_mib if r else None) for r in found)])
    return "\n\n".join(
        [
            describe(report),
            "Forward and backward in ms, median (quartiles):",
            render_table(time_cells, markdown=True),
            *report.notes,
            "Peak memory above the inputs in MiB, each in its own process:",
            render_table(memory_cells, markdown=True),
            f"![Time and peak memory against the number of rows]({picture})",
        ]
    )


def describe(report: Report) -> str:
    """One sentence on what was run, on what, with which versions."""
    first, machine = report.results[0], report.machine
    against = f", M={first.num_cols}" if first.num_cols else ""
    place = machine["gpu"] or f"{machine['num_threads']} threads of {machine['cpu']}"
    vector = next((isa for isa in ("avx512f", "avx2", "asimd") if isa in machine["isa"]), "")
    changed = " with local changes" if machine["dirty"] == "yes" else ""
    return (
        f"D={first.dim}{against}, {first.num_classes} classes, τ={first.temperature:g}, "
        f"{first.summation}/{first.denominator}, {first.dtype}; {place}"
        f"{f' ({vector})' if vector else ''}, {first.peak_source} "
        f"{first.peak_gflops or 0:.0f} GFLOP/s (share of peak counts "
        f"{'6 NMD' if first.num_cols else '4 N²D'} FLOP); "
        f"torch {machine['torch']}, supcon_kernels {machine['supcon_kernels']} at "
        f"{machine['commit']}{changed}, pytorch-metric-learning "
        f"{machine['pytorch_metric_learning']}, Python {machine['python']}; {machine['date']}."
    )


def _time_cell(result: Result | None) -> str:
    if result is None:
        return ""
    if result.time_ms is None:
        return result.verdict
    quartiles = f"{_digits(result.time_q25_ms)}–{_digits(result.time_q75_ms)}"
    return f"{_digits(result.time_ms)} ({quartiles})"


def _digits(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
