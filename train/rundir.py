"""Where a run lives: its name, its folder, and which checkpoint --resume means."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from checkpoint import LAST, checkpoints_in
from config import PretrainConfig, UserError


def open_run(config: PretrainConfig) -> tuple[Path, list[Path]]:
    """Find or make the folder of a run.

    Returns:
        The folder, and the checkpoints to go on from, the newest first; none: the run is new.

    Raises:
        UserError: there is no such checkpoint, the name is taken, or nothing can be written there.
    """
    try:
        folder, checkpoints = _find_or_make(config)
        with tempfile.TemporaryFile(dir=folder):
            return folder, checkpoints
    except OSError as error:
        raise UserError(f"cannot write a run: {error}; choose another --output_dir") from error


@contextmanager
def removed_if_empty(folder: Path) -> Iterator[None]:
    """Leave no folder of a run behind that failed before it wrote there."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            folder.rmdir()
        raise


def _find_or_make(config: PretrainConfig) -> tuple[Path, list[Path]]:
    if config.resume not in ("none", "auto"):
        return _from_path(config)
    parent = Path(config.output_dir)
    if config.resume == "auto":
        folder = parent / config.name if config.name else _latest(parent, default_name(config))
        # Stopped before its first checkpoint: nothing to keep, so the folder is used again.
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            return folder, checkpoints_in(folder)
    if config.name is None:
        return _make_numbered(parent, default_name(config)), []
    folder = parent / config.name
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            f"{folder} already holds a run: choose another --name, or go on with --resume auto"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder, []


def default_name(config: PretrainConfig) -> str:
    """The name of a run whose --name was not given, before it is numbered."""
    dataset, _, path = config.dataset.partition(":")
    folder = re.sub(r"[^\w.-]+", "_", Path(path).resolve().name) if path else ""
    return "-".join(filter(None, [dataset, folder, config.method, f"seed{config.seed}"]))


def _from_path(config: PretrainConfig) -> tuple[Path, list[Path]]:
    path = Path(config.resume)
    if path.is_file():
        return path.parent, [path]
    checkpoints = checkpoints_in(path)
    if not checkpoints:
        missing = path / LAST if path.is_dir() else path
        raise UserError(f"--resume {config.resume}: there is no checkpoint {missing}")
    return path, checkpoints


def _make_numbered(parent: Path, name: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1


def _latest(parent: Path, name: str) -> Path | None:
    pattern = re.compile(re.escape(name) + r"(?:-(\d+))?")
    found = [
        (int(match[1] or 1), folder)
        for folder in (parent.iterdir() if parent.is_dir() else ())
        if folder.is_dir() and (match := pattern.fullmatch(folder.name))
    ]
    return max(found)[1] if found else None
