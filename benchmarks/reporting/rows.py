"""Rows as CSV files: where they go, how they are written and read, the options of their commands."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from measuring.machine import REPOSITORY
from measuring.results import Report, Result

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RESULTS = REPOSITORY / "benchmarks" / "results"
TRIALS = REPOSITORY / "runs" / "benchmarks"
"""Rows go to TRIALS, which git ignores, unless --update says that they replace the committed ones."""


Row = TypeVar("Row", bound="DataclassInstance")


def ints(text: str) -> tuple[int, ...]:
    """An option's list of numbers, as 64,128."""
    return tuple(int(part) for part in text.split(","))


def names(text: str) -> tuple[str, ...]:
    """An option's list of names, as bfloat16,float32."""
    return tuple(text.split(","))


def add_output_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add the options that ``results_path`` takes."""
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="of the rows, instead of runs/benchmarks"
    )
    parser.add_argument(
        "--update", action="store_true", help="replace the committed rows in benchmarks/results"
    )


def results_path(name: str, output_dir: Path | None, update: bool) -> Path:
    """Where a file of rows is: in the folder that was named, or as ``update`` has it."""
    return (output_dir or (RESULTS if update else TRIALS)) / name


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


def write_rows(path: Path, rows: Sequence[DataclassInstance]) -> None:
    write_table(path, [asdict(row) for row in rows])


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """What ``write_rows`` wrote of that dataclass."""
    with path.open(newline="") as file:
        return [
            kind(**{f.name: _from_cell(row[f.name], str(f.type)) for f in fields(kind)})
            for row in csv.DictReader(file)
        ]


def _from_cell(text: str, kind: str) -> str | int | float | None:
    if kind == "str":
        return text
    if not text:
        return None
    return int(text) if kind.startswith("int") else float(text)


def write_report(report: Report, path: Path) -> None:
    derived = ("gflops", "peak_share")
    write_table(
        path,
        [
            asdict(result) | {name: getattr(result, name) for name in derived} | report.machine
            for result in report.results
        ],
    )


def read_report(path: Path) -> Report:
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
