"""Which tile is fastest: the pair kernels of several widths, each alone in many tiles that take turns.

Every tile is first compiled and run once in a process of its own, all cores at work; one that cannot
be launched, hangs or is wrong there is not timed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from gpu import backend
from gpu.place import Items, Place, Row, Skipped
from gpu.processes import in_processes
from gpu.timing import time_interleaved
from measuring.workloads import Workload, make_problem
from supcon_kernels import available_backends, supcon_loss
from supcon_kernels.triton_tiles import Tile

CHECKED_ROWS = 8192
SECONDS = 6.0


@dataclass(frozen=True)
class Compared:
    """A kernel whose tiles are compared, and the numbers of rows that they are timed at."""

    phase: str
    dtype: str
    dim: int
    num_rows: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.phase} {self.dtype} D={self.dim}"

    def workload(self, place: Place, num_rows: int) -> Workload:
        num_rows = 64 if place.is_tiny else num_rows
        return Workload(num_rows, self.dim, dtype=self.dtype, device=place.device)


COMPARED = (
    Compared("forward", "bfloat16", 768, (16384,)),
    Compared("derivatives", "bfloat16", 768, (16384,)),
    Compared("forward", "float32", 128, (8192,)),
    Compared("derivatives", "float32", 128, (8192,)),
    Compared("forward", "bfloat16", 256, (16384,)),
    Compared("backward", "bfloat16", 256, (16384,)),
    Compared("forward", "bfloat16", 128, (8192, 32768)),
    Compared("backward", "bfloat16", 128, (8192, 32768)),
    Compared("forward", "bfloat16", 64, (16384,)),
    Compared("backward", "bfloat16", 64, (16384,)),
)

TINY = (
    Compared("forward", "float16", 16, (64,)),
    Compared("backward", "float16", 16, (64,)),
    Compared("derivatives", "float32", 136, (64,)),
)


def items(place: Place) -> Items:
    if reason := available_backends()["triton"]:
        raise Skipped(reason)
    return {
        each.name: functools.partial(_compare, place, each)
        for each in (TINY if place.is_tiny else COMPARED)
    }


def _step(workload: Workload) -> tuple[torch.Tensor, ...]:
    problem = make_problem(workload)
    loss = supcon_loss(problem.features, problem.labels, temperature=0.1, backend="triton")
    return loss.detach(), torch.autograd.grad(loss, problem.features)[0]


def _compare(place: Place, compared: Compared) -> Iterator[Row]:
    tried = backend.tiles(compared.phase, compared.dtype, compared.dim)
    if place.is_tiny:
        tried = tried[:2]
    bound = compared.workload(place, CHECKED_ROWS).error_bound
    sound = []
    for answer in in_processes(place, try_tile, [(compared, tile) for tile in tried]):
        _, tile = answer.argument
        is_wrong = answer.status == "ok" and not answer.result["error"] <= bound
        status = "wrong" if is_wrong else answer.status
        row = _about(compared, tile) | {"status": status, "detail": answer.detail}
        yield row | {"compile_s": answer.seconds} | (answer.result or {})
        if status == "ok":
            sound.append(tile)
    for num_rows in compared.num_rows:
        yield from _time(place, compared, sound, compared.workload(place, num_rows))


def _about(compared: Compared, tile: Tile) -> Row:
    of = {"phase": compared.phase, "dtype": compared.dtype, "dim": compared.dim}
    return {**of, "tile": backend.describe(tile), **asdict(tile)}


def try_tile(place: Place, call: tuple[Compared, Tile]) -> Row:
    """Registers and spills of the kernel, and how far the tile's result is from the table's."""
    compared, tile = call
    workload = compared.workload(place, CHECKED_ROWS)
    expected = _step(workload)
    with backend.using_tiles(compared.phase, tile):
        found = _step(workload)
        launched = backend.pair_kernel(lambda: _step(workload), compared.phase)
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


def _time(place: Place, compared: Compared, sound: list[Tile], workload: Workload) -> Iterator[Row]:
    calls = {}
    for tile in sound:
        with backend.using_tiles(compared.phase, tile):
            launched = backend.pair_kernel(lambda: _step(workload), compared.phase)
        calls[tile] = functools.partial(lambda launched, mark: launched.again(), launched)
    names = {backend.describe(tile): tile for tile in calls}
    budget_s = 0.0 if place.is_tiny else min(SECONDS, max(0.0, place.seconds_left) / 4)
    laps = time_interleaved({n: calls[tile] for n, tile in names.items()}, place.device, budget_s)
    products = 2 if compared.phase == "backward" else 1
    shipped = backend.shipped_tile(compared.phase, workload.dtype, workload.dim)
    for name, tile in names.items():
        time_ms, (low, high) = laps[name].median, laps[name].quartiles
        yield {
            **{"num_rows": workload.num_rows, **_about(compared, tile)},
            **{"kernel_ms": time_ms, "q25_ms": low, "q75_ms": high},
            "tflops": 2e-9 * products * workload.num_pairs * workload.dim / time_ms,
            "is_ahead": laps[name].is_ahead,
            "is_shipped": tile == shipped,
        }
