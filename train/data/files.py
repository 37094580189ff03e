"""Which images lie in files: their names in arrays, which workers share.

The processes of a loader begin with the memory of their parent, and copy what is written to. A list
of a million strings is: Python counts the references to each as it is read.
"""

import os
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np

from data.shards import ShardFile

File = str | ShardFile


class Strings(Sequence[str]):
    """Strings in one array of bytes, as those of paths are."""

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [os.fsencode(string) for string in strings]
        self.ends = np.cumsum([0, *map(len, encoded)])
        self.bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        return os.fsdecode(self.bytes[self.ends[number] : self.ends[number + 1]].tobytes())


class ShardFiles(Sequence[ShardFile]):
    """Files within shards, in an array for each of what is said of them."""

    def __init__(self, files: Sequence[ShardFile]) -> None:
        places = {shard: place for place, shard in enumerate(dict.fromkeys(f.shard for f in files))}
        self.shards = Strings(places)
        self.names = Strings(file.name for file in files)
        self.numbers = np.array([[places[f.shard], f.offset, f.size] for f in files], np.int64)

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> ShardFile: ...
    @overload
    def __getitem__(self, index: slice) -> list[ShardFile]: ...
    def __getitem__(self, index: int | slice) -> ShardFile | list[ShardFile]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        place, offset, size = self.numbers[index].tolist()
        return ShardFile(self.shards[place], self.names[index], offset, size)


def in_arrays(files: Sequence[File]) -> Sequence[File]:
    """The same files, all of them paths or all of them within shards."""
    if isinstance(files, Strings | ShardFiles):
        return files
    paths = [file for file in files if isinstance(file, str)]
    if paths:
        return Strings(paths)
    return ShardFiles([file for file in files if isinstance(file, ShardFile)])
