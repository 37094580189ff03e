"""The file of rows: JSON lines, appended one by one and synced, so that a kill loses nothing written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

from gpu.place import Row

NAME = "rows.jsonl"
LIMIT_BYTES = 15 << 20
"""Beyond which only how runs, stages and parts go is kept: no file of a folder reaches 16 MiB."""


class Journal:
    """Appends to ``rows.jsonl`` of a folder. What a killed writer left unfinished is cut off first."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / NAME
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        finished = self.path.read_bytes().rfind(b"\n") + 1
        os.ftruncate(self._file, finished)
        self._size = os.lseek(self._file, finished, os.SEEK_SET)
        self._is_full = False

    def append(self, row: Row) -> None:
        line = encode(row)
        is_short = "event" in row or row["stage"] == "run"
        if not is_short and (self._is_full or self._size + len(line) > LIMIT_BYTES):
            if self._is_full:
                return
            self._is_full = True
            detail = f"{NAME} is full: rows after {LIMIT_BYTES >> 20} MiB are left out"
            line = encode({"stage": row["stage"], "status": "failed", "detail": detail})
        self._size += os.write(self._file, line)
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


def encode(row: Row) -> bytes:
    """One line of JSON, in which numbers that are not finite are words."""
    return (
        json.dumps(_finite(row), allow_nan=False, default=str, ensure_ascii=False).encode() + b"\n"
    )


def _finite(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return value


def read_rows(places: Iterable[Path]) -> list[Row]:
    """The rows of files, or of the folders that hold them; an unfinished last line is none."""
    rows = []
    for place in places:
        path = place / NAME if place.is_dir() else place
        finished, _, _ = path.read_bytes().rpartition(b"\n")
        rows += [json.loads(line) for line in finished.splitlines()]
    return rows
