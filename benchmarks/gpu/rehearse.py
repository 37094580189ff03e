"""Compiles ahead of time, without a card, whatever the kit would launch on one, by the Triton that is here.

python benchmarks/gpu_check.py rehearse exits 1 where a launch that ships has a fault, or a tile does not
compile; a tile that spills, or needs more than the architecture has, is one that the card would refuse.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from codegen.compiler import compile_all
from codegen.kernels import Source
from gpu.backend import sources
from gpu.place import Place
from gpu.speed import shapes
from reporting.rows import ints

ARCH = 90
TILED = ("bfloat16", 128)
"""The dtype and width whose tiles are compared, among them those of H in blocks, of every width."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check.py rehearse", description=__doc__)
    widths = list(dict.fromkeys((s.workload.dtype, s.workload.dim) for s in shapes(Place())))
    every = tuple(dict.fromkeys(dim for _, dim in widths))
    parser.add_argument("--dims", type=ints, default=every, help="such as 64,128; default: all")
    parser.add_argument(
        "--every", type=int, default=1, help="compile only one of so many launches and tiles"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)

    shipped: list[Source] = []
    tiles: list[Source] = []
    for dtype, dim in widths:
        if dim in args.dims:
            found = sources(dtype, dim, ARCH, with_tiles=(dtype, dim) == TILED)
            tiles += [source for source in found if " in " in source.label]
            shipped += [source for source in found if " in " not in source.label]
    shipped, tiles = shipped[:: args.every], tiles[:: args.every]
    rows = compile_all([*shipped, *tiles], args.jobs)
    faults = [
        f"{row.label}, {row.dtype}, D={row.dim}: {f}"
        for row in rows[: len(shipped)]
        for f in row.faults
    ]
    faults += [f"{row.label}: {row.failure}" for row in rows[len(shipped) :] if row.failure]
    refused = sum(1 for row in rows[len(shipped) :] if row.faults)
    print("\n".join(f"FAULT: {fault}" for fault in faults))
    print(
        f"Triton {rows[0].triton}: {len(shipped)} launches and {len(tiles)} tiles compiled for sm_{ARCH}, "
        f"{len(faults)} faults; {refused} tiles spill or do not fit"
    )
    return int(bool(faults))
