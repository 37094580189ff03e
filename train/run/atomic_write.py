"""Files that a crash, a power cut or a full disk leaves whole: the old one or the new one."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from run import next_steps
from run.errors import UserError

TEMPORARY = ".tmp"
# A quota and a file-size limit end a write as a full disk does.
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace `path` in one step, once every byte of the new file is on the disk."""
    with _replacement(path) as temporary, open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Replace `path` by a text in one step."""
    replace_file(path, lambda file: file.write(text.encode()))


def link_file(source: Path, path: Path) -> None:
    """Make `path` another name of `source`, which is on the disk, in one step.

    A hard link takes no room and outlives the first name; a file system without links gets a copy.
    """
    with _replacement(path) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
            return
        except OSError:
            shutil.copyfile(source, temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Turn the error of a full disk into one that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise UserError(
            f"cannot write to {folder}: {error.strerror}. Every checkpoint there is whole: free "
            f"some space and continue by {next_steps.resume(folder)}"
        ) from error


@contextmanager
def _replacement(path: Path) -> Iterator[Path]:
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    # The rename itself is only safe against a power cut once its folder is synced; not every
    # system can open a folder.
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
