"""All that the kit knows of the Triton backend's insides: its launches, its tiles, its pair kernels.

It knows that the backend launches through ``triton_run.run``, that a plan finds its tiles in two
tables, and what ``shipped_launches`` lists. All else goes through ``supcon_loss``. Where the backend
changes, this file follows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from codegen.kernels import Source, shipped
from supcon_kernels import triton_launch, triton_run, triton_shipped
from supcon_kernels.triton_launch import Launch, Plan
from supcon_kernels.triton_tiles import BACKWARD, DERIVATIVES, FORWARD, Tile, padded_dim

PAIR_KERNELS = {"forward": "_forward_kernel", "backward": "_backward_kernel"}
"""The kernel over all pairs of each phase: nearly all of the time at large N."""
TILED_KERNELS = {**PAIR_KERNELS, "derivatives": "_derivatives_kernel"}
"""With that of H in blocks, which wide rows have instead of the second."""
TABLES = {"forward": FORWARD, "backward": BACKWARD, "derivatives": DERIVATIVES}
"""Where a plan finds the tile of each phase."""
SHARED_KIB = 227
"""Of a program on an H100 or H200."""


@dataclasses.dataclass(frozen=True)
class Launched:
    """One launch that a step made, with the arguments that it had."""

    launch: Launch
    device: torch.device
    arguments: dict[str, Any]

    def again(self) -> None:
        """Launch it once more, alone."""
        triton_run.run(self.launch, self.device, self.arguments)

    @property
    def compiled(self) -> Any:
        """The compiled kernel; None under the interpreter."""
        kernel, _ = triton_run._compiled.get((self.launch.code, self.device.index), (None, None))
        return kernel


def launches_of(step: Callable[[], object]) -> list[Launched]:
    """Every kernel that the backend launches in a step, in order."""
    found: list[Launched] = []
    run = triton_run.run

    def recorded(launch: Launch, device: torch.device, arguments: dict[str, Any]) -> None:
        found.append(Launched(launch, device, arguments))
        run(launch, device, arguments)

    with mock.patch.object(triton_run, "run", recorded):
        step()
    return found


def pair_kernel(step: Callable[[], object], phase: str) -> Launched:
    """The launch of a step's pair kernel."""
    return next(x for x in launches_of(step) if x.launch.kernel == TILED_KERNELS[phase])


def shipped_tile(phase: str, dtype: str, dim: int, arch: int = 90) -> Tile:
    """The tile of the default loss, as the table has it."""
    found: list[Tile] = []
    find = Plan._find

    def recorded(plan: Plan, running: bool) -> Tile:
        found.append(find(plan, TABLES[phase], running))
        return found[-1]

    with _chosen_by(phase, recorded):
        shipped([dtype], [dim], [arch])
    return found[0]


def tiles(phase: str, dtype: str = "bfloat16", dim: int = 128) -> list[Tile]:
    """The shipped tile, then those around it whose operands fit, and whose sums fit a thread's registers."""
    shipped_one, padded = shipped_tile(phase, dtype, dim), padded_dim(dim)
    shallow, *deeper = (16, 32) if dtype == "float32" else (64, 128)
    depths: dict[int, tuple[int, ...]] = {shallow: (3, 4), **{depth: (2, 3) for depth in deeper}}
    depths = {depth: stages for depth, stages in depths.items() if depth < padded}
    if padded <= 256 and dtype != "float32":
        depths = (depths if phase != "backward" else {}) | {padded: (1, 2, 3, 4)}
    found = [
        _resident(Tile(rows, cols, depth, num_warps, num_stages), dtype, padded)
        for rows, cols, depth, num_warps in itertools.product(
            (64, 128), (32, 64, 128, 256) if phase == "backward" else (64, 128, 256), depths, (4, 8)
        )
        for num_stages in depths[depth]
        if rows >= 16 * num_warps
        and rows * cols >= 512 * num_warps
        and rows * cols <= 128 * 32 * num_warps
        and _sums(phase, rows, cols, padded) <= 224 * 32 * num_warps
        and _kib(dtype, padded, rows, cols, depth, num_stages) <= SHARED_KIB
    ]
    return list(dict.fromkeys([shipped_one, *found]))


def _sums(phase: str, rows: int, cols: int, padded: int) -> int:
    """Numbers that a program adds to."""
    return rows * (cols + padded if phase == "backward" else cols)


def _resident(tile: Tile, dtype: str, padded: int) -> Tile:
    kib = _kib(dtype, padded, tile.rows, tile.cols, tile.chunk, tile.num_stages)
    residents = max(1, min(3, int((SHARED_KIB + 1) // (kib + 1)), 16 // tile.num_warps))
    return dataclasses.replace(tile, residents=residents)


def _kib(dtype: str, padded: int, rows: int, cols: int, chunk: int, num_stages: int) -> float:
    """Shared memory of a program's operands."""
    streamed = num_stages * cols + rows * (1 if chunk == padded else num_stages)
    return (4 if dtype == "float32" else 2) * chunk * streamed / 1024


def using_tiles(phase: str, tile: Tile) -> contextlib.AbstractContextManager[None]:
    """Have the backend take this tile in one phase, and its table's in the other."""
    return _chosen_by(phase, lambda plan, running: tile)


@contextlib.contextmanager
def _chosen_by(phase: str, choose: Callable[[Plan, bool], Tile]) -> Iterator[None]:
    find = Plan._find

    def found(plan: Plan, table: Any, running: bool) -> Tile:
        return choose(plan, running) if table is TABLES[phase] else find(plan, table, running)

    with mock.patch.object(Plan, "_find", found):
        _forget_plans()
        yield
    _forget_plans()


class _PlanInBlocks(Plan):
    """A plan whose backward writes H in blocks, however narrow the rows are."""

    is_wide = True


_plan_in_blocks = functools.lru_cache(maxsize=256)(_PlanInBlocks)


def in_blocks() -> contextlib.AbstractContextManager[object]:
    """Have the backend write H in blocks, as it does where rows are wide."""
    return mock.patch.object(triton_launch, "plan_of", _plan_in_blocks)


def _forget_plans() -> None:
    """What the backend remembers of former calls was planned with other tiles."""
    for place in (Plan, triton_launch):
        for value in vars(place).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def sources(dtype: str, dim: int, arch: int, *, with_tiles: bool) -> list[Source]:
    """What the kit would launch at this width, to be compiled where there is no card."""
    found = [
        s for s in shipped([dtype], [dim], [arch]) if "out/all" in s.label or "/" not in s.label
    ]
    for phase, kernel in PAIR_KERNELS.items() if with_tiles else ():
        for tile in tiles(phase, dtype, dim):
            with using_tiles(phase, tile):
                launched = shipped([dtype], [dim], [arch])
            source = next(s for s in launched if s.launch.kernel == kernel)
            found.append(dataclasses.replace(source, label=f"{phase} in {describe(tile)}"))
    with mock.patch.object(triton_shipped, "Plan", _PlanInBlocks):
        known = {source.launch.code for source in found}
        for source in shipped([dtype], [dim], [arch]):
            if source.label.startswith("backward out/all") and source.launch.code not in known:
                found.append(dataclasses.replace(source, label=f"{source.label} in blocks"))
    return found


def describe(tile: Tile) -> str:
    sizes = f"{tile.rows}×{tile.cols}×{tile.chunk}"
    return f"{sizes} warps={tile.num_warps} stages={tile.num_stages}"
