"""Which tile is fastest: the pair kernel of each phase alone, in about thirty tiles that take turns.

Every tile is first compiled and run once in a process of its own, all cores at work; one that cannot
be launched, hangs or is wrong there is not timed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict

import torch

from gpu import backend
from gpu.place import Items, Place, Row, Skipped
from gpu.processes import in_processes
from gpu.timing import time_interleaved
from measuring.workloads import Workload, make_problem
from supcon_kernels import available_backends, supcon_loss
from supcon_kernels.triton_tiles import Tile

NUM_ROWS = (8192, 32768)
SECONDS = 12.0


def items(place: Place) -> Items:
    if reason := available_backends()["triton"]:
        raise Skipped(reason)
    return {phase: functools.partial(_compare, place, phase) for phase in backend.PAIR_KERNELS}


def _workload(place: Place, num_rows: int) -> Workload:
    if place.is_tiny:
        return Workload(64, 16, num_classes=4, dtype="float16", device=place.device)
    return Workload(num_rows, dtype="bfloat16", device=place.device)


def _step(workload: Workload) -> tuple[torch.Tensor, ...]:
    problem = make_problem(workload)
    loss = supcon_loss(problem.features, problem.labels, temperature=0.1, backend="triton")
    return loss.detach(), torch.autograd.grad(loss, problem.features)[0]


def _compare(place: Place, phase: str) -> Iterator[Row]:
    workload = _workload(place, NUM_ROWS[0])
    tried = backend.tiles(phase, workload.dtype, workload.dim)
    if place.is_tiny:
        tried = tried[:2]
    sound = []
    for answer in in_processes(place, try_tile, [(phase, tile) for tile in tried]):
        _, tile = answer.argument
        is_wrong = answer.status == "ok" and not answer.result["error"] <= workload.error_bound
        status = "wrong" if is_wrong else answer.status
        row = {"phase": phase, "status": status, "detail": answer.detail}
        yield row | {"compile_s": answer.seconds} | (answer.result or {}) | _about(tile)
        if status == "ok":
            sound.append(tile)
    for num_rows in NUM_ROWS[:1] if place.is_tiny else NUM_ROWS:
        yield from _time(place, phase, sound, _workload(place, num_rows))


def _about(tile: Tile) -> Row:
    return {"tile": backend.describe(tile), **asdict(tile)}


def try_tile(place: Place, call: tuple[str, Tile]) -> Row:
    """Registers and spills of the kernel, and how far the tile's result is from the table's."""
    phase, tile = call
    workload = _workload(place, NUM_ROWS[0])
    expected = _step(workload)
    with backend.using_tiles(phase, tile):
        found = _step(workload)
        launched = backend.pair_kernel(lambda: _step(workload), phase)
    launched.again()
    kernel = launched.compiled
    differences = [
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True)
    ]
    return {
        "error": max(differences),
        "registers": getattr(kernel, "n_regs", None),
        "spills": getattr(kernel, "n_spills", None),
        "shared_bytes": getattr(getattr(kernel, "metadata", None), "shared", None),
    }


def _time(place: Place, phase: str, sound: list[Tile], workload: Workload) -> Iterator[Row]:
    calls = {}
    for tile in sound:
        with backend.using_tiles(phase, tile):
            launched = backend.pair_kernel(lambda: _step(workload), phase)
        calls[tile] = functools.partial(lambda launched, mark: launched.again(), launched)
    names = {backend.describe(tile): tile for tile in calls}
    budget_s = 0.0 if place.is_tiny else min(SECONDS, max(0.0, place.seconds_left) / 4)
    laps = time_interleaved({n: calls[tile] for n, tile in names.items()}, place.device, budget_s)
    products = 1 if phase == "forward" else 2
    for name, tile in names.items():
        time_ms, (low, high) = laps[name].median, laps[name].quartiles
        yield {
            **{"phase": phase, "num_rows": workload.num_rows, **_about(tile)},
            **{"kernel_ms": time_ms, "q25_ms": low, "q75_ms": high},
            "tflops": 2e-9 * products * workload.num_pairs * workload.dim / time_ms,
            "is_ahead": laps[name].is_ahead,
            "is_shipped": tile == backend.shipped_tile(phase, workload.dtype, workload.dim),
        }
