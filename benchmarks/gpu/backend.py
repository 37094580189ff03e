"""All that the kit knows of the Triton backend's insides: its launches, its tiles, its pair kernels.

Everything else goes through ``supcon_loss``. Where the backend changes, this file follows.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from gpu_codegen import Source, shipped
from supcon_kernels import triton_launch
from supcon_kernels.backends import triton as triton_backend
from supcon_kernels.triton_launch import Launch, Plan, Target, Tile

PAIR_KERNELS = {"forward": "_forward_kernel", "backward": "_backward_kernel"}
"""The kernel over all pairs of each phase: nearly all of the time at large N."""


@dataclasses.dataclass(frozen=True)
class Launched:
    """One launch that a step made, with the arguments that it had."""

    launch: Launch
    arguments: dict[str, Any]

    def again(self) -> Any:
        """Launch it once more, alone; answers the compiled kernel."""
        from supcon_kernels import triton_kernels

        return getattr(triton_kernels, self.launch.kernel)[self.launch.grid](
            **self.arguments,
            **self.launch.constexprs,
            num_warps=self.launch.num_warps,
            num_stages=self.launch.num_stages,
        )


def launches_of(step: Callable[[], object]) -> list[Launched]:
    """Every kernel that the backend launches in a step, in order."""
    found: list[Launched] = []
    run = triton_backend._run

    def recorded(launch: Launch, **arguments: Any) -> None:
        found.append(Launched(launch, arguments))
        run(launch, **arguments)

    with mock.patch.object(triton_backend, "_run", recorded):
        step()
    return found


def pair_kernel(step: Callable[[], object], phase: str) -> Launched:
    """The launch of a step's pair kernel."""
    return next(x for x in launches_of(step) if x.launch.kernel == PAIR_KERNELS[phase])


def shipped_tile(phase: str, dtype: str, dim: int, arch: int = 90) -> Tile:
    """The tile of the default loss, as the table has it."""
    plan = _plan(dtype, dim, arch)
    return plan.forward_tile if phase == "forward" else plan.backward_tile


def tiles(phase: str, dtype: str = "bfloat16", dim: int = 128, arch: int = 90) -> list[Tile]:
    """The shipped tile, then about thirty around it: operands fit, and a warp has 16 rows of its own."""
    shipped_one = shipped_tile(phase, dtype, dim, arch)
    found = [shipped_one]
    for rows in (64, 128):
        for cols in (32, 64, 128):
            for num_warps in (4, 8):
                for num_stages in (1, 2, 3, 4):
                    tile = dataclasses.replace(
                        shipped_one,
                        rows=rows,
                        cols=cols,
                        narrow=min(cols, shipped_one.narrow),
                        num_warps=num_warps,
                        num_stages=num_stages,
                    )
                    kib = 2 * dim * (rows + num_stages * cols) / 1024
                    if kib <= 227 and rows >= 16 * num_warps and rows * cols >= 512 * num_warps:
                        found.append(tile)
    return list(dict.fromkeys(found))


@contextlib.contextmanager
def using_tiles(phase: str, tile: Tile) -> Iterator[None]:
    """Have the backend take this tile in one phase, and its table's in the other."""

    class Given(dict[Plan, Plan]):
        def get(self, plan: Plan, default: Any = None) -> Any:
            both = {"forward": plan.forward_tile, "backward": plan.backward_tile, phase: tile}
            return dataclasses.replace(plan, measured=(both["forward"], both["backward"]))

    with mock.patch.object(triton_backend, "_measured", Given()):
        yield


def sources(dtype: str, dim: int, arch: int, *, with_tiles: bool) -> list[Source]:
    """What the kit would launch at this width, to be compiled where there is no card."""
    found = [
        s for s in shipped([dtype], [dim], [arch]) if "out/all" in s.label or "/" not in s.label
    ]
    if not with_tiles:
        return found
    plan = _plan(dtype, dim, arch)
    for phase in PAIR_KERNELS:
        for tile in tiles(phase, dtype, dim, arch):
            in_tile = dataclasses.replace(plan, measured=(tile, tile))
            launch = in_tile.forward() if phase == "forward" else in_tile.backward(of_columns=False)
            label = f"{phase} in {describe(tile)}"
            module = "supcon_kernels.triton_kernels"
            found.append(Source("supcon_kernels", module, label, dtype, dim, arch, launch))
    return found


def describe(tile: Tile) -> str:
    return f"{tile.rows}×{tile.cols} warps={tile.num_warps} stages={tile.num_stages}"


def _plan(dtype: str, dim: int, arch: int) -> Plan:
    return triton_launch.plan_of(
        dtype, dim, 16384, None, Target(arch, 132), True, "out", "all", True
    )
