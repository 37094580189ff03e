"""What a run found: one row per provider, size and phase, as CSV and as tables.

README's tables come from these rows alone, between two markers that this file owns.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from machine import REPOSITORY
from providers import OURS
from workloads import Workload, worst

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

BEGIN, END = "<!-- bench_loss:begin -->", "<!-- bench_loss:end -->"
UNTIMED = ("wrong", "failed", "unavailable")
RESULTS = REPOSITORY / "benchmarks" / "results"
TRIALS = REPOSITORY / "runs" / "benchmarks"
"""Rows go to TRIALS, which git ignores, unless --update says that they replace the committed ones."""


@dataclass(frozen=True)
class Result(Workload):
    """One measured phase of one provider; what was not measured is None."""

    provider: str = ""
    phase: str = "both"
    status: str = "ok"  # ok | unchecked | wrong | failed | unavailable
    note: str = ""
    time_ms: float | None = None
    time_q25_ms: float | None = None
    time_q75_ms: float | None = None
    num_samples: int | None = None
    peak_mib: float | None = None
    loss_error: float | None = None
    grad_error: float | None = None
    bound: float | None = None
    peak_gflops: float | None = None
    peak_source: str = ""

    @property
    def gflops(self) -> float | None:
        """Useful rate of a whole step: the least FLOP that it needs over its time."""
        if self.phase != "both" or self.time_ms is None:
            return None
        return 1e-6 * self.num_flops / self.time_ms

    @property
    def peak_share(self) -> float | None:
        if self.gflops is None or not self.peak_gflops:
            return None
        return self.gflops / self.peak_gflops

    @property
    def errors(self) -> list[float]:
        return [e for e in (self.loss_error, self.grad_error) if e is not None]

    @property
    def verdict(self) -> str:
        """What stands in place of a time."""
        return f"WRONG ({worst(self.errors):.1e})" if self.status == "wrong" else self.status


@dataclass(frozen=True)
class Report:
    """The rows of one run and the machine they were measured on."""

    results: list[Result]
    machine: dict[str, str]

    def find(self, num_rows: int, provider: str, phase: str) -> Result | None:
        wanted = (num_rows, provider, phase)
        return next((r for r in self.results if (r.num_rows, r.provider, r.phase) == wanted), None)

    @property
    def notes(self) -> list[str]:
        """Why there is no time, once per provider and reason."""
        untimed = (r for r in self.results if r.status in UNTIMED and r.note)
        return list(dict.fromkeys(f"{r.provider} {r.status}: {r.note}." for r in untimed))

    @property
    def sizes(self) -> list[int]:
        return sorted({r.num_rows for r in self.results})

    @property
    def providers(self) -> list[str]:
        return list(dict.fromkeys(r.provider for r in self.results))


def add_output_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add the options that ``results_path`` takes."""
    parser.add_argument("--output-dir", type=Path, help="of the rows; None: runs/benchmarks")
    parser.add_argument("--update", action="store_true", help="replace those in benchmarks/results")


def results_path(name: str, output_dir: Path | None, update: bool) -> Path:
    """Where a file of rows is: in the folder that was named, or as ``update`` has it."""
    return (output_dir or (RESULTS if update else TRIALS)) / name


def write_csv(report: Report, path: Path) -> None:
    derived = ("gflops", "peak_share")
    write_table(
        path,
        [
            asdict(result) | {name: getattr(result, name) for name in derived} | report.machine
            for result in report.results
        ],
    )


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows of the same columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _to_cell(value) for name, value in row.items()})
    print(f"wrote {path}", file=sys.stderr)


def _to_cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def read_csv(path: Path) -> Report:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} has no rows")
    columns = {f.name: str(f.type) for f in fields(Result)}
    results = [
        Result(**{name: _from_cell(row[name], kind) for name, kind in columns.items()})  # type: ignore[arg-type]
        for row in rows
    ]
    derived = {"gflops", "peak_share"}
    machine = {key: text for key, text in rows[0].items() if key not in columns.keys() | derived}
    return Report(results, machine)


def _from_cell(text: str, kind: str) -> str | int | float | None:
    if kind == "str":
        return text
    if not text:
        return None
    return int(text) if kind.startswith("int") else float(text)


def rate_against_peak(results: Iterable[Result], gflops: float, source: str) -> list[Result]:
    return [replace(result, peak_gflops=gflops, peak_source=source) for result in results]


def render_table(cells: Sequence[Sequence[str]], markdown: bool) -> str:
    """Lay out a header and rows, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        [cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(pairs)]
        for pairs in (list(zip(row, widths, strict=True)) for row in cells)
    ]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in lines)
    rule = ["-" * width if not i else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


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


def readme_block(report: Report, picture: str) -> str:
    """The part of README between the markers: one time table, one memory table, the picture."""
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


def replace_block(readme: Path, report: Report, csv_path: Path) -> tuple[str, str]:
    """README's text as it is and as it should be."""
    old = readme.read_text()
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        raise ValueError(f"{readme} needs one {BEGIN} and, after it, one {END}")
    picture = os.path.relpath(csv_path.resolve().with_suffix(".png"), readme.resolve().parent)
    before, after = old.split(BEGIN)[0], old.split(END)[1]
    return old, f"{before}{BEGIN}\n{readme_block(report, picture)}\n{END}{after}"


# --- rows of any kind, for the tools that have no times to report


Row = TypeVar("Row", bound="DataclassInstance")


def write_rows(path: Path, rows: Sequence[DataclassInstance]) -> None:
    write_table(path, [asdict(row) for row in rows])


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """What ``write_rows`` wrote of that dataclass."""
    with path.open(newline="") as file:
        return [
            kind(**{f.name: _from_cell(row[f.name], str(f.type)) for f in fields(kind)})
            for row in csv.DictReader(file)
        ]


def update_document(document: Path, name: str, block: str, only_check: bool) -> bool:
    """Put the block between the document's two markers of that name; answer whether it differed."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    old = document.read_text()
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        raise ValueError(f"{document} needs one {begin} and, after it, one {end}")
    new = f"{old.split(begin)[0]}{begin}\n{block}\n{end}{old.split(end)[1]}"
    if new != old and not only_check:
        document.write_text(new)
    return new != old
