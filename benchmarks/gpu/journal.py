"""The file of rows: JSON lines, appended one by one and synced, so that a kill loses nothing written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

from gpu.place import Row

NAME = "rows.jsonl"


class Journal:
    """Appends to ``rows.jsonl`` of a folder. What a killed writer left unfinished is cut off first."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / NAME
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        finished = self.path.read_bytes().rfind(b"\n") + 1
        os.ftruncate(self._file, finished)
        os.lseek(self._file, finished, os.SEEK_SET)

    def append(self, row: Row) -> None:
        os.write(self._file, encode(row))
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
