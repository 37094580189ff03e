"""Where a run lives: its name, its folder, who writes there, and which checkpoint --resume means."""

import errno
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from run import next_steps
from run.checkpoint import LAST, checkpoints_in
from run.errors import UserError
from run.rules import broken

if sys.platform != "win32":
    import fcntl

LOCK = ".lock"


@dataclass
class FolderOptions:
    """The folder of the run.

    Args:
        output_dir: The run is written to output_dir/name.
        name: Name of the run. Default: dataset, method and seed, with a number if the name is taken.
        resume: none: start a new run. auto: resume the run of this name from its newest whole
            checkpoint, or start it (without --name: the latest run of the default name). PATH: resume
            from this checkpoint or run folder. Options that shaped earlier steps cannot change.
            epochs, max_steps, knn_every, save_every and log can: a longer or shorter run follows the
            schedule of its new length, and keeps its warm-up. data_root or the path in dataset can
            change if the same images have moved.
    """

    output_dir: str = "runs"
    name: str | None = None
    resume: str = "none"

    def mistakes(self) -> list[str]:
        """What contradicts itself, one sentence each."""
        rules = [
            (
                self.name is None
                or (self.name == Path(self.name).name and self.name not in ("", "..")),
                f"--name {self.name}: a folder name without slashes is needed",
            ),
            (
                self.name is None or self.resume in ("none", "auto") or self._resumes_itself(),
                f"--name {self.name} contradicts --resume {self.resume}: a run stays in its folder",
            ),
        ]
        return broken(rules)

    def _resumes_itself(self) -> bool:
        path = Path(self.resume).resolve()
        return self.name == (path if path.is_dir() else path.parent).name


class RunLock:
    """Once taken, keeps other processes out of the folder of a run until it is left.

    The system lets go of it when the process ends, however it ends; the file stays. It is a lock of
    this process alone (lockf): workers that outlive it for a while do not hold it, as with flock.
    """

    file: IO[str] | None = None

    def take(self, folder: Path) -> None:
        """Take it, or go on with a warning where the file system has no locks.

        Raises:
            UserError: another process has it.
        """
        if sys.platform == "win32":
            return
        while True:
            self.file = open(folder / LOCK, "a")  # noqa: SIM115
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise UserError(
                        f"another process is writing to {folder}: choose another --name, or wait "
                        "until it ends"
                    ) from error
                print(
                    f"warning: {folder} cannot be locked ({error.strerror}): start no other run "
                    "there",
                    file=sys.stderr,
                )
                return
            # The process that had the lock may have removed the file after it was opened here.
            if os.fstat(self.file.fileno()).st_nlink > 0:
                return
            self.file.close()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *error: object) -> None:
        if self.file is not None:
            self.file.close()


def open_folder(
    options: FolderOptions, default_name: str, lock: RunLock
) -> tuple[Path, list[Path]]:
    """Find or make the folder of a run, and take its lock.

    Args:
        default_name: of a run whose --name was not given, before it is numbered.

    Returns:
        The folder, and the checkpoints to go on from, the newest first; none: the run is new.

    Raises:
        UserError: there is no such checkpoint, the name is taken, another process writes there, or
            nothing can be written there.
    """
    try:
        folder = _find_or_make(options, default_name)
        with tempfile.TemporaryFile(dir=folder):
            lock.take(folder)
    except OSError as error:
        raise UserError(f"cannot write a run: {error}; choose another --output_dir") from error
    if options.resume == "none" and any(path.name != LOCK for path in folder.iterdir()):
        what = "is not empty, and holds no run: choose another --name"
        if (folder / "config.yaml").is_file() or checkpoints_in(folder):
            what = (
                "already holds a run: choose another --name, or continue it by "
                + next_steps.resume(folder)
            )
        raise UserError(f"{folder} {what}")
    if options.resume in ("none", "auto"):
        # Without any the run stopped before its first checkpoint: nothing to keep, it starts again.
        return folder, checkpoints_in(folder)
    path = Path(options.resume)
    return folder, [path] if path.is_file() else checkpoints_in(folder)


@contextmanager
def removed_if_empty(folder: Path) -> Iterator[None]:
    """Leave no folder of a run behind that failed before it wrote there."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            if [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
            folder.rmdir()
        raise


def _find_or_make(options: FolderOptions, default_name: str) -> Path:
    if options.resume not in ("none", "auto"):
        return _of_path(options)
    parent = Path(options.output_dir)
    folder = parent / options.name if options.name else None
    if folder is None and options.resume == "auto":
        folder = _latest(parent, default_name)
    if folder is None:
        return _make_numbered(parent, default_name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _of_path(options: FolderOptions) -> Path:
    path = Path(options.resume)
    if path.is_file():
        return path.parent
    # A run that stopped before its first checkpoint has left its config, and starts again.
    if not checkpoints_in(path) and not (path / "config.yaml").is_file():
        missing = path / LAST if path.is_dir() else path
        raise UserError(f"--resume {options.resume}: there is no checkpoint {missing}")
    return path


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
