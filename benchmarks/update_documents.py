"""Write the tables of README.md and docs/results.md from the committed rows in benchmarks/results/.

python benchmarks/update_documents.py            # after a benchmark was run with --update
python benchmarks/update_documents.py --check    # exits 1 where a table is not what the rows say
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Mapping, Sequence

from measuring.machine import REPOSITORY
from measuring.providers import OURS
from reporting.documents import DOCS, render_table, update_document
from reporting.loss import describe, time_and_memory
from reporting.rows import RESULTS, read_report

Rows = list[dict[str, str]]
NATIVE = f"{OURS}native]"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    check = parser.parse_args().check
    stale = [
        f"{document.relative_to(REPOSITORY)}: {name}"
        for document, blocks in (
            (REPOSITORY / "README.md", {"results": summary}),
            (DOCS / "results.md", PAGE | {"pipeline": pipeline}),
        )
        for name, block in blocks.items()
        if update_document(document, name, block(), check)
    ]
    if check and stale:
        print(f"not what the rows say: {', '.join(stale)}", file=sys.stderr)
    return int(check and bool(stale))


def summary() -> str:
    """README's table: the largest batch, then time and memory of the loss alone; then a whole step."""
    report = read_report(RESULTS / "loss_cpu_float32.csv")
    batches = {row["provider"]: row for row in rows_of("batch_cpu_float32")}
    sizes = (512, 2048, 8192)
    budget = float(next(iter(batches.values()))["budget_mib"])
    header = ["", f"largest N in {budget:.0f} MiB", *(f"ms, N = {size}" for size in sizes)]
    cells = [[*header, f"MiB, N = {sizes[-1]}"]]
    for provider, batch in batches.items():
        found = [report.find(size, provider, "both") for size in sizes]
        cells.append(
            [
                "**supcon_kernels**" if provider == NATIVE else provider,
                f"{int(batch['largest_rows']):,}",
                *(number(result.time_ms if result else None) for result in found),
                number(found[-1].peak_mib if found[-1] else None),
            ]
        )
    return f"{render_table(cells, markdown=True)}\n\n{describe(report)}\n\n{whole_step()}"


def whole_step() -> str:
    """What a training step of the driver is, beside one as SupContrast's script makes it."""
    loops = {row["loop"]: row for row in rows_of("train_cpu")}
    driver, plain = loops["driver_simclr"], loops["plain_simclr"]
    share = float(driver["loss_share"])
    return (
        f"In a whole training step ({driver['model']} of width {driver['width']}, "
        f"{driver['image_size']} px, {driver['batch_size']} images, {driver['num_views']} views, the "
        f"same CPU) the loss takes {share:.1%}. The driver trains "
        f"{float(driver['images_per_second']):.0f} images/s, a loop in SupContrast's manner "
        f"{float(plain['images_per_second']):.0f}."
    )


def pipeline() -> str:
    """What evaluate.py found of cross-entropy and SupCon: of each number the mean of all seeds, and its range."""
    rows = rows_of("pipeline_cpu")
    columns = ["top-1", "ECE", "MAP@R", "corrupted top-1", "mCE", "train_minutes"]
    cells = [["", *columns[:-1], "minutes"]]
    for method in dict.fromkeys(row["method"] for row in rows):
        found = [row for row in rows if row["method"] == method]
        of = {name: [float(row[name]) for row in found] for name in columns}
        minutes = of.pop("train_minutes")
        cells.append([method, *map(shares, of.values()), f"{min(minutes):.0f}"])
    first = rows[0]
    return (
        f"{render_table(cells, markdown=True)}\n\nPercent: the mean of {len(found)} seeds (lowest–highest). "
        f"{first['num_cores']} cores of {first['cpu']}, commit {first['commit']}; {first['date']}. "
        "`pipeline_cpu.csv`"
    )


def shares(values: Sequence[float]) -> str:
    """Their mean and range in percent."""
    low, high = (f"{100 * end:.1f}" for end in (min(values), max(values)))
    return f"{100 * sum(values) / len(values):.1f}" + (f" ({low}–{high})" if low != high else "")


def loss() -> str:
    return time_and_memory(
        read_report(RESULTS / "loss_cpu_float32.csv"),
        "../benchmarks/results/loss_cpu_float32.png",
    )


def scaling() -> str:
    return time_and_memory(
        read_report(RESULTS / "scaling_cpu_float32.csv"),
        "../benchmarks/results/scaling_cpu_float32.png",
    )


def variants() -> str:
    """Forward and backward of every other kind of call, and of other widths, beside the dense formula."""
    cells = [["call", "N", "dense", "native", "times as fast"]]
    for path in sorted(RESULTS.glob("*_cpu_float*.csv")):
        kind = path.stem.split("_cpu_")[0]
        if not (
            kind.startswith(("variant", "rectangle", "running", "dim")) or "float64" in path.stem
        ):
            continue
        report = read_report(path)
        first = report.results[0]
        call = f"{first.summation}/{first.denominator}, τ = {first.temperature:g}, {first.dtype}"
        call += f", M = {first.num_cols}" if first.num_cols else ""
        call += f", D = {first.dim}" if first.dim != 128 else ""
        for size in report.sizes:
            dense, native = (report.find(size, name, "both") for name in ("dense", NATIVE))
            if dense and native and dense.time_ms and native.time_ms:
                ratio = f"{dense.time_ms / native.time_ms:.1f}"
                cells.append(
                    [call, f"{size}", number(dense.time_ms), number(native.time_ms), ratio]
                )
    return render_table(cells, markdown=True)


def table_of(name: str, columns: Mapping[str, str]) -> Callable[[], str]:
    """A table of a file's rows with these columns, under these headings."""

    def table() -> str:
        rows = rows_of(name)
        cells = [list(columns.values()), *([cell(row[key]) for key in columns] for row in rows)]
        first = rows[0]
        place = f"{first['num_cores']} cores of {first['cpu']}, torch {first['torch']}"
        made = f"{place}, commit {first['commit']}; {first['date']}. `{name}.csv`"
        return f"{render_table(cells, markdown=True)}\n\n{made}"

    return table


def cell(text: str) -> str:
    try:
        value = float(text)
    except ValueError:
        return text
    if value.is_integer() and "." not in text:
        return text
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def rows_of(name: str) -> Rows:
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


THREADS = {
    "num_rows": "N",
    "num_cols": "M",
    "threads": "threads",
    "simulated_speed_up": "simulated",
    "measured_speed_up": "measured",
}
# The blocks of docs/results.md, by the name of their markers.
PAGE: dict[str, Callable[[], str]] = {
    "loss": loss,
    "scaling": scaling,
    "variants": variants,
    "batch": table_of(
        "batch_cpu_float32",
        {"provider": "loss", "largest_rows": "largest N", "peak_mib": "its peak in MiB"},
    ),
    "bfloat16": table_of(
        "loss_cpu_bfloat16",
        {"num_rows": "N", "provider": "features", "phase": "phase", "time_ms": "ms"},
    ),
    "targets": table_of(
        "targets_cpu_float32",
        {"targets": "positives by", "time_ms": "ms", "time_over_labels": "of integer labels"},
    ),
    "both_ways": table_of(
        "both_ways_cpu_float32",
        {
            "both_directions": "both directions by",
            "time_ms": "ms",
            "time_over_one_call": "of one call",
        },
    ),
    "threads": table_of("threads_cpu_float32", THREADS),
    "threads_16": table_of("threads_16_cores_cpu_float32", THREADS),
    "training": table_of(
        "train_cpu",
        {
            "loop": "loop",
            "images_per_second": "images/s",
            "over_bare": "of the bare loop",
            "loss_share": "share of the loss",
            "data_share": "share of the data",
        },
    ),
    "input": table_of(
        "input_cpu",
        {
            "loader": "loader",
            "views": "crops an image",
            "images_per_second_per_core": "images/s a core",
        },
    ),
    "options": table_of("train_options_cpu", {"loop": "loop", "images_per_second": "images/s"}),
    "grad_cache": table_of(
        "grad_cache_cpu",
        {
            "batch_size": "batch",
            "form": "form",
            "peak_mib": "peak MiB",
            "seconds": "seconds a step",
        },
    ),
    "digits": table_of(
        "digits",
        {
            "seed": "seed",
            "knn_accuracy": "k-NN",
            "knn_raw_pixels": "raw pixels",
            "knn_untrained": "untrained",
            "time_s": "seconds",
        },
    ),
}


if __name__ == "__main__":
    sys.exit(main())
