"""Tar shards in the layout of webdataset: the images that they hold, and where.

Shards are files, those of a URL fetched first: a stream can be entered only at its start and tells
its labels last. A file is read once for an index; then its images are those of a folder, in any
order, from any step on, for any number of processes and workers.
"""

import hashlib
import re
import shutil
import tarfile
from collections.abc import Iterator
from http.client import HTTPException
from io import BytesIO
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, NamedTuple, cast
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import urlopen

from webdataset import gopen
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from run.errors import UserError

IMAGES = ("jpg", "jpeg", "png", "webp")
LABEL = "cls"
FETCHED = "webdataset"
SECONDS_TO_ANSWER = 30
NOT_FETCHED = (
    "a checkpoint names it, and only what you name yourself is fetched: "
    "python train/linear.py --checkpoint PATH --dataset ..."
)


class ShardFile(NamedTuple):
    """A file in a tar, whose bytes lie there as they are."""

    shard: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.name} in {self.shard}"

    def open(self) -> BytesIO:
        """The file, read into memory."""
        with open(self.shard, "rb") as shard:
            shard.seek(self.offset)
            return BytesIO(shard.read(self.size))


def read_index(urls: str, *, root: Path, fetch: bool = True) -> tuple[list[ShardFile], list[int]]:
    """Find the images of some shards, in order, and their labels.

    Args:
        urls: paths, or URLs that webdataset opens, with braces for several, as in
            DATA/train-{000..127}.tar.
        root: where copies of shards that are no local files are kept.
        fetch: whether such copies may be made, which opens a URL or runs a command.

    Raises:
        UserError: a shard cannot be had or read, or a sample in it lacks its image or label.
    """
    try:
        shards = expand_urls(urls)
    except (ValueError, AssertionError) as error:
        raise UserError(f"webdataset: cannot expand {urls}: {error}") from error
    samples = [
        sample
        for shard in local_copies(shards, root=root, fetch=fetch)
        for sample in _samples(shard)
    ]
    if not samples:
        raise UserError(f"webdataset: {urls} holds no image ({', '.join(IMAGES)})")
    return [file for file, _ in samples], [label for _, label in samples]


def _samples(shard: str) -> Iterator[tuple[ShardFile, int]]:
    try:
        with tarfile.open(shard, "r:") as tar:
            members = [member for member in tar if member.isreg()]
            # tarfile takes a header that it cannot read for the end, where there are zeros alone.
            file = cast(IO[bytes], tar.fileobj)
            file.seek(tar.offset)
            end = file.read()
            if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):
                raise tarfile.ReadError(f"truncated or damaged at byte {tar.offset}")
            files = ((*base_plus_ext(member.name), member) for member in members)
            for key, group in groupby(files, key=itemgetter(0)):
                parts = {extension.lower(): member for _, extension, member in group if key}
                image = next((parts[kind] for kind in IMAGES if kind in parts), None)
                if image is None and LABEL not in parts:
                    continue
                if image is None or LABEL not in parts:
                    missing = "image" if image is None else f"label (a file {key}.{LABEL})"
                    raise UserError(f"{shard}: the sample {key} has no {missing} beside it")
                label = tar.extractfile(parts[LABEL])
                assert label is not None
                yield (
                    ShardFile(shard, image.name, image.offset_data, image.size),
                    _integer(label.read(), f"{key}.{LABEL} in {shard}"),
                )
    except (OSError, tarfile.TarError) as error:
        raise UserError(
            f"cannot read the shard {shard}: {error} (a whole tar is needed, not compressed)"
        ) from error


def _integer(text: bytes, name: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"{name} is no label: an integer is needed, not {text[:20]!r}") from error


def local_copies(urls: list[str], *, root: Path, fetch: bool = True) -> list[str]:
    """The files of some shards, each fetched to `root` unless it is local or was before.

    Raises:
        UserError: one is not here and cannot be, or may not be, fetched.
    """
    paths = [_local_path(url, root) for url in urls]
    missing = {
        url: Path(path)
        for url, path in zip(urls, paths)
        if not _is_local(url) and not Path(path).is_file()
    }
    if missing and not fetch:
        raise UserError(f"webdataset: {next(iter(missing))} is not in files here; {NOT_FETCHED}")
    if missing:
        print(f"fetching {len(missing)} of {len(urls)} shards to {root / FETCHED}", flush=True)
    for url, path in missing.items():
        _fetch(url, path)
    return paths


def _is_local(url: str) -> bool:
    return urlsplit(url).scheme in ("", "file")


def _local_path(url: str, root: Path) -> str:
    if _is_local(url):
        return url if urlsplit(url).scheme == "" else unquote(urlsplit(url).path)
    readable = re.sub(r"[^\w.-]+", "_", url)[-80:]
    return str(root / FETCHED / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{readable}")


def _fetch(url: str, path: Path) -> None:
    """Copy what a URL gives to a file, whole or not at all, also beside others who do the same."""
    is_web = urlsplit(url).scheme in ("http", "https")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent) as folder:
            copy = Path(folder, path.name)
            # webdataset leaves these to curl, which tries for a quarter of an hour and keeps the
            # reason to itself.
            source = urlopen(url, timeout=SECONDS_TO_ANSWER) if is_web else gopen(url)
            with source as stream, open(copy, "wb") as file:
                shutil.copyfileobj(stream, file)
                if is_web and stream.length:
                    raise OSError(f"the connection closed {stream.length} bytes before the end")
            copy.replace(path)
    except (OSError, ValueError, HTTPException) as error:
        if isinstance(error, HTTPError):
            error.close()  # the answer that it holds
        raise UserError(f"cannot fetch {url} to {path.parent}: {error}") from error
