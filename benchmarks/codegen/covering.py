"""A selection of all kernels that can be launched, small enough to compile in an hour."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from itertools import combinations

from codegen.kernels import Source

# Constants of a launch that follow from dtype, width and architecture.
_DERIVED = [
    "ROWS",
    "COLS",
    "CHUNK",
    "PRECISION",
    "TF32",
    "PADDED_DIM",
    "BLOCK_ROWS",
    "BLOCK_DIM",
]


def distinct(sources: Sequence[Source]) -> list[Source]:
    """The first source of each kernel: dtype and width are no part of some."""
    first: dict[Hashable, Source] = {}
    for source in sources:
        first.setdefault((source.launch.code, source.arch), source)
    return list(first.values())


def covering(sources: Sequence[Source], strength: int = 3) -> list[Source]:
    """Sources in their order, so that any ``strength`` options of a kernel meet as they do in all.

    An option is a constant of the launch, the dtype, the width or the architecture. Wherever a
    source has some value of each of three options, so has one that is returned. Found by taking, again
    and again, a source with most combinations that no other has yet, the first of several.
    """
    missing: set[Hashable] = set()
    of: list[list[Hashable]] = []
    for source in sources:
        of.append([(source.launch.kernel, c) for c in combinations(_options(source), strength)])
        missing.update(of[-1])
    chosen = []
    queue = [(-len(met), index) for index, met in enumerate(of)]
    heapq.heapify(queue)
    while missing:
        _, index = heapq.heappop(queue)
        gain = sum(met in missing for met in of[index])
        if queue and (-gain, index) > queue[0]:
            heapq.heappush(queue, (-gain, index))  # it was worth more when it was last counted
            continue
        missing.difference_update(of[index])
        chosen.append(index)
    return [sources[index] for index in sorted(chosen)]


def _options(source: Source) -> list[tuple[str, Hashable]]:
    given = [("dtype", source.dtype), ("D", source.dim), ("sm", source.arch)]
    constants = source.launch.constexprs.items()
    return [*given, *(pair for pair in constants if pair[0] not in _DERIVED)]
