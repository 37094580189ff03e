"""What the Triton kernels compile to, without a GPU: registers, spills, shared memory, instructions.

Every kernel that the backend may launch is compiled ahead of time for each architecture, and its
disassembly is read (codegen/sass.py says what a main loop is). A kernel that serves several widths or
dtypes is compiled once; those of the default loss have a row for each width.
Exits 1 where a kernel spills registers, needs more shared memory than the architecture has, multiplies
16-bit numbers without tensor cores, or holds an atomic on global memory other than the loss kernel's
count of its programs.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from codegen.chips import SHARED_KIB
from codegen.compiler import compile_all, fingerprint
from codegen.kernels import (
    DIMS,
    DTYPES,
    EARLIER_CSV,
    OURS_CSV,
    PEERS_CSV,
    Compiled,
    Source,
    distinct,
    shipped,
)
from codegen.peers import peer_sources
from codegen.tables import codegen_block, full_table, name_of, peers_block
from measuring.machine import describe_machine
from reporting.documents import DOCS, update_document
from reporting.rows import ints, names, read_rows, write_rows

DEFAULT_LOSS = "ward out/all$"


def main(argv: Sequence[str] | None = None) -> int:
    args = _make_parser().parse_args(argv)
    is_peers = args.peers is not None
    csv_path = args.output or (PEERS_CSV if is_peers else OURS_CSV)
    known = read_rows(csv_path, Compiled) if args.resume and csv_path.exists() else []
    rows = read_rows(csv_path, Compiled) if args.table else _compile_wanted(args, known)
    print(full_table(rows))
    is_stale = False
    if args.check:
        is_stale = differs_from(csv_path, rows, _possible(args.peers))
    elif not args.table:
        write_rows(csv_path, merged(rows, known, _possible(args.peers)) if args.resume else rows)
        _say(f"wrote {csv_path}")
    if args.update_docs or args.check:
        is_stale |= update_docs(args.docs, only_check=args.check)
    faults = [(row, fault) for row in rows if not is_peers for fault in row.faults]
    for row, fault in faults:
        _say(f"FAULT: {name_of(row)} {fault}")
    _say(f"{len(rows)} kernels, {len(faults)} faults")
    return int(bool(faults) or is_stale)


def _compile_wanted(args: argparse.Namespace, known: Sequence[Compiled]) -> list[Compiled]:
    sources = peer_sources(args.peers, args.dims, args.archs) if args.peers else _selected(args)
    machine = describe_machine("cpu")
    commit, dirty = machine["commit"], machine["dirty"]
    # What is known has this commit's fingerprint, so it is a row of this commit as well.
    return [
        replace(row, commit=commit, dirty=dirty) for row in compile_all(sources, args.jobs, known)
    ]


def _selected(args: argparse.Namespace) -> list[Source]:
    """Each kernel once, but for the default loss: what a pair costs there depends on the width."""
    every = shipped(DTYPES, DIMS, tuple(SHARED_KIB))
    once = {source.key for source in distinct(every)}
    kept = [s for s in every if s.key in once or re.search(DEFAULT_LOSS, s.label)]
    return [source for source in kept if _is_wanted(source, args)]


def _is_wanted(source: Source, args: argparse.Namespace) -> bool:
    asked = ((source.dtype, args.dtypes), (source.dim, args.dims), (source.arch, args.archs))
    found = re.search(args.labels, source.label)
    return found is not None and all(value in values for value, values in asked)


def _possible(peers: Path | None) -> list[Source]:
    """All that the CSV may hold a row of."""
    archs = tuple(SHARED_KIB)
    return peer_sources(peers, DIMS, archs) if peers else shipped(DTYPES, DIMS, archs)


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what is compiled")
    what.add_argument(
        "--dtypes", type=names, default=DTYPES, help="such as bfloat16,float32; default: all"
    )
    what.add_argument("--dims", type=ints, default=DIMS, help="such as 64,128; default: all")
    what.add_argument(
        "--archs", type=ints, default=tuple(SHARED_KIB), help="such as 80,90; default: all"
    )
    what.add_argument(
        "--labels", default="", metavar="REGEX", help="only kernels whose label has it: out/all$"
    )
    what.add_argument(
        "--peers",
        type=Path,
        metavar="DIR",
        help="compile the kernels of memeff and Inf-CL instead, which are in DIR: "
        "pip install --no-deps --target DIR memeff==0.3.1 inf-cl==1.2.1",
    )
    what.add_argument(
        "--resume",
        action="store_true",
        help="compile only what has changed since the CSV was written, keep its other rows",
    )
    what.add_argument("--jobs", type=int, default=2, help="number of processes; default: 2")
    out = parser.add_argument_group("output")
    out.add_argument(
        "--output", type=Path, metavar="CSV", help="default: the one in benchmarks/results"
    )
    out.add_argument("--table", action="store_true", help="compile nothing, print the CSV")
    out.add_argument(
        "--update-docs", action="store_true", help="update the tables in gpu.md and kernels.md"
    )
    out.add_argument(
        "--docs", type=Path, default=DOCS, metavar="DIR", help="the folder of both; default: docs"
    )
    out.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit 1 if a document is out of date, or a row compiled by the same Triton",
    )
    return parser


def merged(
    rows: Sequence[Compiled], known: Sequence[Compiled], sources: Sequence[Source]
) -> list[Compiled]:
    """New rows and the known ones that are still of the sources' code, in the order of the sources."""
    by_key = {row.key: row for row in (*known, *rows)}
    found = [(by_key[source.key], source) for source in sources if source.key in by_key]
    return [row for row, source in found if row.fingerprint == fingerprint(source)]


def differs_from(csv_path: Path, rows: Sequence[Compiled], sources: Sequence[Source]) -> bool:
    """Whether the CSV says something else of these kernels, or nothing; another Triton may."""
    all_known = read_rows(csv_path, Compiled)
    known = {row.key: row for row in all_known}
    outdated = len(all_known) - len(merged([], all_known, sources))
    if outdated and rows and all_known[0].triton == rows[0].triton:
        _say(f"STALE: {outdated} rows of {csv_path.name} are of other code than is shipped now")
        return True
    told = {f.name for f in fields(Compiled)} - {"commit", "dirty"}
    differs = False
    for row in rows:
        old = known.get(row.key)
        if old is not None and old.triton != row.triton:
            continue
        changed = [n for n in told if old is None or _cell(old, n) != _cell(row, n)]
        if changed:
            _say(f"STALE: {csv_path.name} on {name_of(row)}: {', '.join(sorted(changed))}")
            differs = True
    return differs


def _cell(row: Compiled, name: str) -> object:
    value = getattr(row, name)
    return f"{value:.6g}" if isinstance(value, float) else value


def update_docs(docs: Path, only_check: bool) -> bool:
    """Make the documents' tables say what the committed rows say, or only look."""
    ours, earlier, peers = (
        read_rows(path, Compiled) for path in (OURS_CSV, EARLIER_CSV, PEERS_CSV)
    )
    differs = [
        update_document(docs / "gpu.md", "gpu_codegen", codegen_block(ours, earlier), only_check),
        update_document(
            docs / "kernels.md", "gpu_codegen_peers", peers_block([*ours, *peers]), only_check
        ),
    ]
    if any(differs) and only_check:
        _say(f"{docs}: its tables differ from the CSVs")
    return any(differs)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
