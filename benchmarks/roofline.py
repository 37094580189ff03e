"""A model, not a measurement: the least time that forward and backward can take on a card.

It counts the work for N rows of D features (products, exponentials, instructions, bytes, launches)
and divides it by the card's rates, published or measured (--rates). The model itself stands in
codegen/model.py. python benchmarks/roofline.py writes benchmarks/results/roofline.csv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from codegen.kernels import read_compiled
from codegen.model import (
    CARDS,
    PHASES,
    SCHEMES,
    Bound,
    Card,
    bound,
    chunked_bound,
    find_card,
    with_rates,
)
from gpu.journal import read_rows as read_journal
from measuring.workloads import Workload
from reporting.documents import DOCS, render_table, update_document
from reporting.rows import RESULTS, ints, read_rows, write_rows

CSV = RESULTS / "roofline.csv"
NUM_ROWS = (1024, 4096, 8192, 32768, 131072)
# Where float32 by three products of TF32 is compared with chunks of the dense formula.
WIDTHS, ROWS_OF_WIDTHS = (128, 256, 512, 1024), 8192


def main(argv: Sequence[str] | None = None) -> int:
    args = _make_parser().parse_args(argv)
    if args.table:
        bounds = read_rows(args.output, Bound)
    else:
        cards = CARDS if args.rates is None else _measured_card(args.rates)
        bounds = all_bounds(args.rows, args.dims, args.dtypes, cards)
        bounds += [b for b in float32_bounds(cards) if b not in bounds]
    print("A MODEL, NOT A MEASUREMENT: the least time in µs, and the limit that binds.")
    print(full_table(bounds))
    if args.check:
        is_stale = read_rows(args.output, Bound) != [_rounded(each) for each in bounds]
        is_stale |= update_document(args.document, "roofline", document_block(bounds), True)
        if is_stale:
            print(f"STALE: {args.output} or {args.document}", file=sys.stderr)
        return int(is_stale)
    if not args.table:
        write_rows(args.output, bounds)
    if args.update_docs:
        update_document(args.document, "roofline", document_block(bounds), False)
    return 0


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=ints, default=NUM_ROWS, help="numbers of rows, such as 4096,8192"
    )
    parser.add_argument("--dims", type=ints, default=(128,), help="such as 128,256; default: 128")
    parser.add_argument("--dtypes", nargs="+", default=("bfloat16", "float32"))
    parser.add_argument(
        "--rates",
        type=Path,
        metavar="FILE",
        help="rows.jsonl of gpu_check.py: use the rates that it measured on its card",
    )
    parser.add_argument("--output", type=Path, default=CSV)
    parser.add_argument("--table", action="store_true", help="compute nothing, print the CSV")
    parser.add_argument(
        "--update-docs", action="store_true", help="update the table in the document"
    )
    parser.add_argument("--document", type=Path, default=DOCS / "gpu.md")
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit 1 if the CSV or the document is out of date",
    )
    return parser


def _measured_card(path: Path) -> list[Card]:
    """The card that a run of gpu_check.py has measured."""
    rows = read_journal([path])
    names = [row["gpu"] for row in rows if row.get("gpu")]
    card = find_card(names[-1]) if names else None
    if card is None:
        raise SystemExit(f"--rates {path}: none of {', '.join(c.name for c in CARDS)} ran there")
    return [with_rates(card, {row["rate"]: row["value"] for row in rows if "rate" in row})]


def all_bounds(
    num_rows: Sequence[int],
    dims: Sequence[int],
    dtypes: Sequence[str],
    cards: Sequence[Card] = CARDS,
) -> list[Bound]:
    compiled = read_compiled()
    return [
        bound(scheme, card, Workload(n, dim, dtype=dtype), phase, compiled)
        for dtype in dtypes
        for dim in dims
        for card in cards
        for n in num_rows
        for scheme in SCHEMES
        for phase in PHASES
    ]


def float32_bounds(cards: Sequence[Card] = CARDS) -> list[Bound]:
    """Three products of TF32 in the kernels' tiles beside chunks of the dense formula."""
    compiled, ours = read_compiled(), SCHEMES[0]
    calls = [
        (card, Workload(ROWS_OF_WIDTHS, dim, dtype="float32")) for dim in WIDTHS for card in cards
    ]
    return [
        each
        for card, call in calls
        for phase in PHASES
        for each in (bound(ours, card, call, phase, compiled), chunked_bound(card, call, phase))
    ]


def _rounded(row: Bound) -> Bound:
    """As it comes back from a CSV."""
    told: dict[str, Any] = {
        k: float(f"{v:.6g}") for k, v in vars(row).items() if isinstance(v, float)
    }
    return replace(row, **told)


def full_table(bounds: Sequence[Bound]) -> str:
    header = ["scheme", "card", "N", "D", "dtype", "phase", "products", "exp"]
    header += ["matrix", "exponential", "instruction", "serial", "memory", "launch", "least"]
    header += ["programs", "limit"]
    cells = [
        [
            *(b.scheme, b.card, str(b.num_rows), str(b.dim), b.dtype, b.phase),
            *(str(b.products), str(b.exponentials)),
            *(_us(getattr(b, f"{name}_us")) for name in header[8:15]),
            *(str(b.programs), b.limit),
        ]
        for b in bounds
    ]
    return render_table([header, *cells], markdown=False)


def document_block(bounds: Sequence[Bound]) -> str:
    """Per scheme and number of rows, the two phases on each card, 16 bits."""
    header = ["N", "scheme", "products", *(f"{c.name} {p}" for c in CARDS for p in PHASES)]
    found = {(b.num_rows, b.scheme, b.card, b.phase): b for b in bounds if b.dtype == "bfloat16"}
    cells = [header]
    for num_rows in sorted({b.num_rows for b in bounds}):
        for scheme in SCHEMES:
            each = [found[num_rows, scheme.name, c.name, p] for c in CARDS for p in PHASES]
            products = "+".join(str(scheme.products(p)) for p in PHASES)
            times = [f"{_us(b.least_us)} ({b.limit})" for b in each]
            cells.append([str(num_rows), scheme.name, products, *times])
    return f"{_table_of_rows(bounds[0].dim, cells)}\n\n{_table_of_widths(bounds)}"


def _table_of_rows(dim: int, cells: Sequence[Sequence[str]]) -> str:
    return (
        f"Model, not measured: least µs at D={dim}, bfloat16 (Inf-CL: widened to float32), "
        f"and the limit that binds (serial: units one after another).\n\n{render_table(cells, markdown=True)}"
    )


def _table_of_widths(bounds: Sequence[Bound]) -> str:
    """Forward and backward together in float32, by width."""
    of_both: dict[tuple[int, str, str], float] = {}
    for b in bounds:
        if (b.dtype, b.num_rows) == ("float32", ROWS_OF_WIDTHS):
            key = (b.dim, b.scheme, b.card)
            of_both[key] = of_both.get(key, 0.0) + b.least_us
    schemes = (SCHEMES[0].name, "chunked dense")
    cells = [["D", *(f"{card.name} {scheme}" for card in CARDS for scheme in schemes)]]
    cells += [
        [str(dim), *(_us(of_both.get((dim, s, card.name))) for card in CARDS for s in schemes)]
        for dim in WIDTHS
    ]
    return (
        f"Model, not measured: least µs of forward and backward at N={ROWS_OF_WIDTHS}, "
        f"float32.\n\n{render_table(cells, markdown=True)}"
    )


def _us(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
