"""Tables as text, and the parts of documents that are generated: each stands between two markers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from measuring.machine import REPOSITORY

DOCS = REPOSITORY / "docs"


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
