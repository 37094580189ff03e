"""What the backend decides by a constant, each way in turn: sizes of blocks of H, sorted or compared labels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from unittest import mock

from gpu.place import Items, Place, Row
from gpu.speed import as_call
from gpu.timing import Call, Mark, eager_ms, time_interleaved
from measuring.providers import OURS, make_provider
from measuring.workloads import Workload, make_problem
from supcon_kernels import triton_call, triton_launch

MIB = (16, 64, 256, 512)
BLOCKS = (("bfloat16", 768, 16384), ("bfloat16", 768, 65536), ("float32", 128, 8192))
LABELS = (("bfloat16", 128, 16384), ("bfloat16", 128, 32768), ("bfloat16", 768, 16384))
SECONDS = 2.0
Patch = Callable[[], AbstractContextManager[object]]


def items(place: Place) -> Items:
    place.needs_cuda()
    blocks = {f"blocks of H of {m} MiB": _blocks_of(m) for m in MIB}
    labels = {
        "labels sorted": _labels_sorted_above(0),
        "labels compared": _labels_sorted_above(1 << 60),
    }
    return {
        f"{what}, {dtype}, D={dim}, N={num_rows}": functools.partial(
            _compare, place, ways, Workload(num_rows, dim, dtype=dtype, device=place.device)
        )
        for what, ways, shapes in (("blocks", blocks, BLOCKS), ("labels", labels, LABELS))
        for dtype, dim, num_rows in shapes
    }


def _blocks_of(mib: int) -> Patch:
    return lambda: mock.patch.object(triton_call, "workspace_bytes", mib << 20)


def _labels_sorted_above(num_pairs: int) -> Patch:
    return lambda: mock.patch.object(triton_launch, "SORTED_PAIRS", num_pairs)


def _compare(place: Place, ways: dict[str, Patch], workload: Workload) -> Iterator[Row]:
    step = as_call(make_provider(f"{OURS}triton]", workload), make_problem(workload))
    calls = {name: _with(patch, step) for name, patch in ways.items()}
    laps = time_interleaved(calls, place.device, SECONDS)
    for name, call in calls.items():
        times = {"forward_ms": laps[name].lap(0), "backward_ms": laps[name].lap(1)}
        eager = {"eager_ms": eager_ms(call, place.device, 5)}
        yield {"choice": name, "is_ahead": laps[name].is_ahead, **times, **eager}


def _with(patch: Patch, step: Call) -> Call:
    def call(mark: Mark) -> None:
        with patch():
            step(mark)

    return call
