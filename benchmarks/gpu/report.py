"""From committed rows to documents: README's table, the measured section of docs/gpu.md, pictures.

python benchmarks/gpu_check.py report reads benchmarks/results/gpu_*.jsonl, each the rows.jsonl of a
run on a card; other files or folders may be named. Without any, README says nothing of a GPU's speed.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from codegen.kernels import read_compiled
from codegen.model import SCHEMES, bound, find_card, with_rates
from gpu.journal import read_rows
from gpu.place import Row
from gpu.summary import Cells, by_tile, speed_cells, three, timed
from measuring.machine import REPOSITORY
from measuring.results import Report, Result
from measuring.workloads import Workload
from reporting.documents import DOCS, render_table, update_document
from reporting.rows import RESULTS

NOT_MEASURED = "Not yet measured on a GPU."
IN_README = {"dim": 128, "num_cols": 0, "num_classes": 10, "dtype": "bfloat16"}
"""The shapes of README's table, and of the picture."""
PROVIDERS = {
    "dense": "dense",
    "dense-compiled": "dense, compiled",
    "inf-cl": "Inf-CL",
    "memeff": "memeff",
    "siglip-kernel": "siglip-kernel",
    "supcon_kernels[triton]": "supcon_kernels",
}
"""Those of README's table, and their titles there."""
IN_MEMORY = ("dense", "memeff", "supcon_kernels[triton]")
Rows = Sequence[Row]


def main(argv: Sequence[str]) -> int:
    parser = _make_parser()
    args = parser.parse_args(argv)
    if missing := [path for path in args.rows if not path.exists()]:
        parser.error(
            f"there is no {missing[0]}: a rows.jsonl, or a folder that holds one, is accepted"
        )
    paths = args.rows or sorted(RESULTS.glob("gpu_*.jsonl"))
    cards = by_card(paths)
    pictures = {card: args.pictures / f"gpu_{card_stem(card)}.png" for card in cards}
    if not args.check:
        for card, rows in cards.items():
            _draw(rows, pictures[card])
    readme, document = args.readme, args.docs / "gpu.md"
    tables = [readme_block(card, rows, pictures[card], readme) for card, rows in cards.items()]
    sections = [measured_block(card, rows) for card, rows in cards.items()]
    differs = [
        update_document(readme, "gpu_speed", "\n\n".join(tables), args.check),
        update_document(
            document, "gpu_measured", "\n\n".join(sections) or NOT_MEASURED, args.check
        ),
    ]
    if any(differs) and args.check:
        print(f"STALE: {readme} or {document} differs from the rows", file=sys.stderr)
    return int(any(differs) and args.check)


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu_check.py report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rows", nargs="*", type=Path, help="files or folders of rows")
    parser.add_argument("--readme", type=Path, default=REPOSITORY / "README.md")
    parser.add_argument("--docs", type=Path, default=DOCS)
    parser.add_argument("--pictures", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where stale")
    return parser


def by_card(paths: Sequence[Path]) -> dict[str, list[Row]]:
    """The rows of all runs by the name of their card; a rehearsal without one is left out."""
    found: dict[str, list[Row]] = {}
    for path in paths:
        card = ""
        for row in read_rows([path]):
            card = row.get("gpu", card) if row["stage"] == "run" else card
            if card:
                found.setdefault(card, []).append(row)
    return found


def card_stem(card: str) -> str:
    """'NVIDIA H100 80GB HBM3' as part of a file's name."""
    return re.sub(r"\W+", "_", card.removeprefix("NVIDIA ")).lower()


# --- README


def readme_block(card: str, rows: Rows, picture: Path, readme: Path) -> str:
    by_key = {(row["num_rows"], row["provider"]): row for row in _newest(rows, IN_README).values()}
    measured = {provider for _, provider in by_key}
    shown = [name for name in PROVIDERS if name in measured]
    in_memory = [name for name in IN_MEMORY if name in measured]
    titles = [f"{PROVIDERS[name]}, ms" for name in shown]
    cells = [["N", *titles, *(f"{PROVIDERS[name]}, MiB" for name in in_memory)]]
    for num_rows in sorted({num_rows for num_rows, _ in by_key}):
        times = [by_key.get((num_rows, name), {}).get("both_ms") for name in shown]
        sizes = [by_key.get((num_rows, name), {}).get("peak_mib") for name in in_memory]
        cells.append([f"{num_rows:,}", *map(three, times), *map(_size, sizes)])
    link = os.path.relpath(picture.resolve(), readme.resolve().parent)
    return "\n\n".join(
        [
            f"{_origin(card, rows)}; D=128, 10 classes, τ=0.1, bfloat16. Forward and backward: the device's "
            "median time, and peak memory above the inputs. Inf-CL, memeff and siglip-kernel have other "
            "losses: no labels, and one positive a row.",
            render_table(cells, markdown=True),
            f"![Time and peak memory against the number of rows on {card}]({link})",
        ]
    )


def _size(mib: float | None) -> str:
    return f"{mib:,.0f}" if mib and mib >= 100 else three(mib)


def _newest(rows: Rows, wanted: Row) -> dict[tuple[object, ...], Row]:
    """Rows with times by what was measured: of repeated ones the last."""
    named = ("provider", "num_rows", "dim", "num_cols", "num_classes", "dtype")
    return {
        tuple(row[name] for name in named): row
        for row in timed(rows)
        if all(row[name] == value for name, value in wanted.items())
    }


def _origin(card: str, rows: Rows) -> str:
    runs = [row for row in rows if row["stage"] == "run" and "torch" in row]
    commits = list(dict.fromkeys(f"{r['commit']}{_changed(r)}" for r in runs))
    last = runs[-1]
    return (
        f"{card}, driver {last.get('driver', 'unknown')}, torch {last['torch']}, Triton "
        f"{last['triton']}, Python {last['python']}; supcon_kernels {last['supcon_kernels']} at "
        f"{', '.join(commits)}; {last['date']}"
    )


def _changed(run: Row) -> str:
    return " with local changes" if run["dirty"] == "yes" else ""


# --- docs/gpu.md


def measured_block(card: str, rows: Rows) -> str:
    rates = {row["rate"]: row for row in rows if "rate" in row}
    in_words = "; ".join(f"{n} {three(r['value'])} {r['unit']}" for n, r in rates.items())
    newest = list(_newest(rows, {}).values())
    parts = [
        f"{_origin(card, rows)}. Measured rates: {in_words or 'none'}.",
        "Steps: `fwd`, `bwd` and `both` are the device's time, `eager` a step from Python, `graph` a "
        "replay, in ms; `share` is of the measured product rate; `?`: the queue ran dry.",
        render_table(speed_cells(newest), markdown=True),
        _beside_model(card, rows, {name: row["value"] for name, row in rates.items()}),
        _kernels(newest),
        _tiles(rows),
        _training(rows),
        _checks(rows),
    ]
    return "\n\n".join(filter(None, parts))


def _beside_model(card_name: str, rows: Rows, rates: dict[str, float]) -> str:
    """Ours against the model of the card as measured."""
    card = find_card(card_name)
    ours = [r for r in _newest(rows, {}).values() if r["provider"].endswith("[triton]")]
    ours = [row for row in ours if not row["num_cols"]]
    if card is None or not ours:
        return ""
    cells: Cells = [["N", "D", "dtype", "phase", "ms", "model ms", "limit", "× model"]]
    compiled, measured = read_compiled(), with_rates(card, rates)
    for row in ours:
        workload = Workload(row["num_rows"], row["dim"], dtype=row["dtype"])
        for phase in ("forward", "backward"):
            least = bound(SCHEMES[0], measured, workload, phase, compiled)
            time_ms, least_ms = row[f"{phase}_ms"], 1e-3 * least.least_us
            shape = [str(workload.num_rows), str(workload.dim), workload.dtype, phase]
            numbers = [three(time_ms), three(least_ms), least.limit, f"{time_ms / least_ms:.2f}"]
            cells.append([*shape, *numbers])
    return f"Beside the model with these rates:\n\n{render_table(cells, markdown=True)}"


def _kernels(newest: Rows) -> str:
    """Where the time of the default step goes."""
    row = next((r for r in newest if r["provider"].endswith("[triton]") and r.get("kernels")), None)
    if row is None:
        return ""
    cells = [["kernel", "launches", "µs"]]
    cells += [[f"`{k['kernel']}`", three(k["launches"]), three(k["us"])] for k in row["kernels"]]
    title = f"Kernels of a step, N={row['num_rows']}, D={row['dim']}, {row['dtype']}:"
    return f"{title}\n\n{render_table(cells, markdown=True)}"


def _tiles(rows: Rows) -> str:
    found = [row for row in rows if "kernel_ms" in row]
    cells: Cells = [["kernel", "dtype", "D", "N", "tile", "ms", "TFLOP/s", "in use then"]]
    for told_apart, same in by_tile(found).items():
        best = sorted(same, key=lambda row: row["kernel_ms"])
        for row in best[:3] + [row for row in best[3:] if row["is_shipped"]]:
            numbers = [three(row["kernel_ms"]), f"{row['tflops']:.0f}"]
            is_shipped = "yes" if row["is_shipped"] else ""
            cells.append([*map(str, told_apart), row["tile"], *numbers, is_shipped])
    return f"Tiles, fastest first:\n\n{render_table(cells, markdown=True)}" if found else ""


def _training(rows: Rows) -> str:
    found = [row for row in rows if "loop" in row]
    if not found:
        return ""
    cells = [["loop", "images/s", "of the bare loop", "share of the loss"]]
    for row in found:
        share = float(row["loss_share"]) if row["loss_share"] else None
        cells.append(
            [
                row["loop"].replace("_", " "),
                f"{float(row['images_per_second']):,.0f}",
                f"{float(row['over_bare']):.0%}",
                f"{share:.1%}" if share else "",
            ]
        )
    one = found[0]
    title = (
        f"Training {one['model']} of width {one['width']}, {one['image_size']} px, "
        f"{one['batch_size']} images of {one['num_views']} views, float32; *plain* is a loop in the manner "
        f"of SupContrast's script with {one['plain_workers']} workers:"
    )
    return f"{title}\n\n{render_table(cells, markdown=True)}"


def _checks(rows: Rows) -> str:
    """How many comparisons held, and every part that did not end well."""
    compared = [row["status"] for row in rows if "case" in row or "call" in row]
    counts = ", ".join(f"{compared.count(s)} {s}" for s in dict.fromkeys(compared))
    ended = [row for row in rows if row.get("event") == "end"]
    held: dict[str, list[str]] = {}
    for row in ended:
        if row["stage"] == "behaviour" and row["status"] == "ok":
            name, _, dtype = row["item"].rpartition(", ")
            held.setdefault(name, []).append(dtype)
    lines = [f"- {name}: {', '.join(dtypes)}" for name, dtypes in held.items()]
    lines += [
        f"- not ok: {row['stage']}, {row['item']}: {row['status']} {row['detail']}".rstrip()
        for row in ended
        if row["status"] != "ok"
    ]
    wrong = [row for row in rows if row.get("status") == "wrong" and "case" in row]
    lines += [
        f"- wrong: {row['case']}, {row['dtype']}, {row['variant']}, {row['ratio']} of its bound"
        for row in wrong
    ]
    return "\n".join([f"Comparisons with float64: {counts}." if counts else "", "", *lines]).strip()


# --- the picture


def _draw(rows: Rows, path: Path) -> None:
    from reporting.picture import draw_picture

    found = _newest(rows, IN_README).values()
    shown = [row for row in found if row["provider"] in PROVIDERS]
    if not shown:
        return
    results = [
        Result(
            num_rows=row["num_rows"],
            dtype=row["dtype"],
            device="cuda",
            provider=row["provider"],
            time_ms=row["both_ms"],
            time_q25_ms=row["q25_ms"],
            time_q75_ms=row["q75_ms"],
            peak_mib=row.get("peak_mib"),
        )
        for row in shown
    ]
    machine = next(row for row in rows if row["stage"] == "run" and "torch" in row)
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_picture(Report(results, machine), path)
