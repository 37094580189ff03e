"""What a run found, in a page: how each stage went, then the numbers that decide what comes next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from gpu.place import Row
from reporting.documents import render_table

LIMIT = 10_000
BAD = ("failed", "wrong", "died", "hung", "out of memory")
Cells = list[list[str]]


def summary(rows: Sequence[Row]) -> str:
    """Of each stage the last run, in at most LIMIT characters; of many failures the first."""
    rows = _last_runs(rows)
    parts = [
        _stages(rows),
        _rates(rows),
        _cases(rows),
        _speed(rows),
        _tiles(rows),
        _choices(rows),
        _driver(rows),
    ]
    text = "\n\n".join(part for part in parts if part)
    failures = _failures(rows)
    room = LIMIT - len(text) - 100
    shown: list[str] = []
    for line in failures:
        room -= len(line) + 1
        if room < 0:
            shown.append(f"… and {len(failures) - len(shown)} more in rows.jsonl")
            break
        shown.append(line)
    whole = "\n\n".join(filter(None, ["\n".join(shown), text]))
    return whole if len(whole) <= LIMIT else f"{whole[: LIMIT - 2]}…"


def _last_runs(rows: Sequence[Row]) -> list[Row]:
    """Of each stage the rows of the last run that holds any."""
    runs: list[int] = []
    last: dict[str, int] = {}
    for row in rows:
        runs.append((runs[-1] if runs else 0) + ("argv" in row))  # with which a run begins
        last[row["stage"]] = runs[-1]
    return [row for row, run in zip(rows, runs) if run == last[row["stage"]]]


def _stages(rows: Sequence[Row]) -> str:
    header = ["stage", "s", "parts ok", "not ok", "skipped", "not reached"]
    cells = [header]
    for row in rows:
        if row.get("event") != "stage":
            continue
        counts: Counter[str] = Counter(row["counts"])
        num_bad = sum(counts.values()) - counts["ok"] - counts["skipped"]
        numbers = (counts["ok"], num_bad, counts["skipped"], len(row["not_reached"]))
        cells.append([row["stage"], f"{row['seconds']:.0f}", *map(str, numbers)])
    return render_table(cells, markdown=False) if cells[1:] else "no stage has ended"


def _failures(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        status = row.get("status")
        if status in (*BAD, "time is up") or (status == "skipped" and row.get("event") == "end"):
            what = row.get("call") or row.get("provider") or row.get("tile") or ""
            if "variant" in row:
                what = f"{row['dtype']} {row['variant']}"
            detail = row.get("detail") or row.get("note") or _errors(row)
            place = ": ".join(filter(None, [row["stage"], row.get("item"), what]))
            lines.append(f"{status.upper()} {place}: {detail}"[:240])
    return lines


def _errors(row: Row) -> str:
    return ", ".join(f"{name} {e} > {b}" for name, (e, b) in row.get("errors", {}).items())


def _rates(rows: Sequence[Row]) -> str:
    lines = [f"{r['rate']}: {three(r['value'])} {r['unit']}" for r in rows if "rate" in r]
    return "\n".join(lines)


def _cases(rows: Sequence[Row]) -> str:
    found = [row for row in rows if "case" in row or "call" in row]
    if not found:
        return ""
    counts = Counter(row["status"] for row in found)
    ratios = [row for row in found if isinstance(row.get("ratio"), float)]
    lines = [", ".join(f"{count} {status}" for status, count in counts.items())]
    for row in sorted(ratios, key=lambda row: -row["ratio"])[:5]:
        name = row.get("call") or f"{row['case']} {row['dtype']} {row['variant']}"
        lines.append(f"  {row['ratio']:.2f} of its bound: {name}")
    return "comparisons with float64: " + "\n".join(lines)


def _speed(rows: Sequence[Row]) -> str:
    cells = speed_cells(rows)
    return render_table(cells, markdown=False) if cells[1:] else ""


def speed_cells(rows: Sequence[Row]) -> Cells:
    """A line for each shape and provider, in the order of the run."""
    cells = [
        ["provider", "N", "D", "classes", "dtype", "fwd ms", "bwd ms", "both", "eager", "graph"]
    ]
    cells[0] += ["TFLOP/s", "share", "launches", "MiB"]
    for row in timed(rows):
        share = row.get("both_share")
        cells.append(
            [
                row["provider"].replace("supcon_kernels", "ours"),
                f"{row['num_rows']}" + (f"×{row['num_cols']}" if row["num_cols"] else ""),
                *(str(row["dim"]), str(row["num_classes"]), row["dtype"]),
                *(three(row[f"{phase}_ms"]) for phase in ("forward", "backward", "both")),
                *(three(row.get("eager_ms")), three(row.get("graph_ms"))),
                f"{row['both_tflops']:.0f}" + ("" if row["is_ahead"] else "?"),
                f"{share:.0%}" if share else "",
                *(three(row.get("launches")), three(row.get("peak_mib"))),
            ]
        )
    return cells


def timed(rows: Sequence[Row]) -> list[Row]:
    """The rows of the speed stage that hold times."""
    return [row for row in rows if row["stage"] == "speed" and "both_ms" in row]


def _tiles(rows: Sequence[Row]) -> str:
    found = [row for row in rows if "kernel_ms" in row]
    lines = []
    for told_apart, same in by_tile(found).items():
        best = sorted(same, key=lambda row: row["kernel_ms"])
        phase, dtype, dim, num_rows = told_apart
        lines.append(f"{phase} kernel, {dtype}, D={dim}, N={num_rows}, of {len(same)} tiles:")
        shown = best[:4] + [row for row in best[4:] if row["is_shipped"]]
        lines += [
            f"  {row['tile']}: {three(row['kernel_ms'])} ms, {row['tflops']:.0f} TFLOP/s"
            + (" (shipped)" if row["is_shipped"] else "")
            for row in shown
        ]
    return "\n".join(lines)


def by_tile(rows: Sequence[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows of the tiles that are compared with each other."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        told_apart = tuple(row[name] for name in ("phase", "dtype", "dim", "num_rows"))
        found.setdefault(told_apart, []).append(row)
    return found


def _choices(rows: Sequence[Row]) -> str:
    return "\n".join(
        f"{row['item']}: {row['choice']}: {three(row['forward_ms'])} + {three(row['backward_ms'])} ms, "
        f"from Python {three(row['eager_ms'])}"
        for row in rows
        if "choice" in row
    )


def _driver(rows: Sequence[Row]) -> str:
    lines = [
        f"{row['loop']}: {row['images_per_second']} images/s, {row['over_bare']} of bare"
        + (f", {row['over_plain']} of SupContrast's way" if row.get("over_plain") else "")
        + "".join(
            f", {phase} {row[f'{phase}_share']}"
            for phase in ("data", "views", "loss")
            if row.get(f"{phase}_share")
        )
        for row in rows
        if "loop" in row
    ]
    lines += [
        f"killed after step {row['killed_after_step']}, resumed: "
        f"largest difference of a weight {row.get('largest_difference', 'not compared')}"
        for row in rows
        if "killed_after_step" in row
    ]
    return "\n".join(lines)


def three(value: float | str | None) -> str:
    """Three digits."""
    return f"{value:.3g}" if isinstance(value, (int, float)) else value or ""
