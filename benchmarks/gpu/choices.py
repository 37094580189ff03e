"""What a constant of the backend or the caller decides, each way in turn.

Blocks of H of several sizes, labels sorted or compared, and both directions in one call or in two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from unittest import mock

import torch
from torch import Tensor

from gpu.place import Items, Place, Row
from gpu.speed import as_call
from gpu.timing import Call, Mark, eager_ms, time_interleaved
from measuring.both_ways import WAYS, LossOfSides
from measuring.providers import OURS, make_provider
from measuring.workloads import Workload, make_problem
from supcon_kernels import triton_call, triton_launch

MIB = (16, 64, 256, 512)
BLOCKS = (("bfloat16", 768, 16384), ("bfloat16", 768, 65536), ("float32", 128, 8192))
LABELS = (("bfloat16", 128, 16384), ("bfloat16", 128, 32768), ("bfloat16", 768, 16384))
BOTH_WAYS = (("bfloat16", 768, 16384), ("float32", 512, 8192), ("bfloat16", 128, 16384))
SECONDS = 2.0
Patch = Callable[[], AbstractContextManager[object]]


def items(place: Place) -> Items:
    place.needs_cuda()
    blocks = {f"blocks of H of {m} MiB": _blocks_of(m) for m in MIB}
    labels = {
        "labels sorted": _labels_sorted_above(0),
        "labels compared": _labels_sorted_above(1 << 60),
    }
    found: Items = {}
    for what, ways, shapes in (("blocks", blocks, BLOCKS), ("labels", labels, LABELS)):
        for dtype, dim, num_rows in shapes:
            w = Workload(num_rows, dim, dtype=dtype, device=place.device)
            compared = functools.partial(_compare, place, functools.partial(_patched, ways, w))
            found[f"{what}, {dtype}, D={dim}, N={num_rows}"] = compared
    for dtype, dim, num_rows in BOTH_WAYS:
        w = Workload(num_rows, dim, num_cols=num_rows, dtype=dtype, device=place.device)
        compared = functools.partial(_compare, place, functools.partial(both_ways, w))
        found[f"both directions, {dtype}, D={dim}, N={num_rows}"] = compared
    return found


def _blocks_of(mib: int) -> Patch:
    return lambda: mock.patch.object(triton_call, "workspace_bytes", mib << 20)


def _labels_sorted_above(num_pairs: int) -> Patch:
    return lambda: mock.patch.object(triton_launch, "SORTED_PAIRS", num_pairs)


def _compare(place: Place, make_calls: Callable[[], dict[str, Call]]) -> Iterator[Row]:
    calls = make_calls()
    laps = time_interleaved(calls, place.device, SECONDS)
    for name, call in calls.items():
        times = {"forward_ms": laps[name].lap(0), "backward_ms": laps[name].lap(1)}
        eager = {"eager_ms": eager_ms(call, place.device, 5)}
        yield {"choice": name, "is_ahead": laps[name].is_ahead, **times, **eager}


def _patched(ways: dict[str, Patch], workload: Workload) -> dict[str, Call]:
    step = as_call(make_provider(f"{OURS}triton]", workload), make_problem(workload))

    def with_patch(patch: Patch) -> Call:
        def call(mark: Mark) -> None:
            with patch():
                step(mark)

        return call

    return {name: with_patch(patch) for name, patch in ways.items()}


def both_ways(workload: Workload) -> dict[str, Call]:
    """Steps of the loss of both directions, by each of the ways to call it."""
    sides = make_problem(workload).leaves

    def step_by(way: LossOfSides) -> Call:
        def call(mark: Mark) -> tuple[Tensor, ...]:
            loss = way(*sides)
            mark()
            return torch.autograd.grad(loss, sides)

        return call

    return {name: step_by(way) for name, way in WAYS.items()}
