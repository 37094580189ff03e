"""The launch logic of the Triton kernels: grids, splits and tables, without a device or triton."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import subprocess
import sys

import pytest

from supcon_kernels import triton_launch
from supcon_kernels.triton_launch import Launch, Plan, Target, Tile

DTYPES = ["float32", "float16", "bfloat16"]
DIMS = [0, 1, 16, 100, 128, 129, 256, 257, 384, 512, 1000, 2048]
CAPABILITIES = [80, 86, 90, 100]
H100 = Target(capability=90, num_multiprocessors=132)


def plan(**changes) -> Plan:
    """A plan of the usual call, with changes."""
    usual = Plan(
        dtype="bfloat16",
        dim=128,
        num_rows=8192,
        num_cols=None,
        target=H100,
        shifted=True,
        summation="out",
        denominator="all",
        normalize=True,
    )
    return dataclasses.replace(usual, **changes)


def launches(dtype="bfloat16", dim=128, capability=90) -> dict[str, Launch]:
    return dict(triton_launch.shipped_launches(dtype, dim, capability))


@pytest.mark.parametrize("dim", DIMS)
def test_rows_are_padded_to_whole_chunks_and_slices(dim):
    padded = triton_launch.padded_dim(dim)
    assert dim <= padded < max(2 * dim, 17) and padded >= 16
    assert all(padded % triton_launch.slice_of(dim, dtype) == 0 for dtype in DTYPES)
    for dtype, capability in itertools.product([*DTYPES, "tf32"], [0, *CAPABILITIES]):
        for launch in launches(dtype, dim, capability).values():
            sizes = launch.constexprs
            if "CHUNK" in sizes and "ROWS" in sizes:
                assert padded % sizes["CHUNK"] == 0
                for name in ("ROWS", "COLS", "CHUNK"):
                    assert sizes[name] >= 16 and sizes[name] & (sizes[name] - 1) == 0
                assert triton_launch.ROW_PADDING % sizes["ROWS"] == 0
                assert triton_launch.ROW_PADDING % sizes["COLS"] == 0
                assert sizes["COLS"] % sizes.get("NARROW", sizes["COLS"]) == 0


@pytest.mark.parametrize("num_rows", [0, 1, 127, 128, 129, 8192, 100_000])
def test_grids_cover_all_rows(num_rows):
    p = plan(num_rows=num_rows)
    padded = triton_launch.padded_rows(num_rows)
    assert padded >= max(num_rows, 1) and padded % triton_launch.ROW_PADDING == 0
    for launch in (p.forward(), p.backward(of_columns=False), p.finish_loss(), p.weights()):
        assert launch.grid[0] * launch.constexprs["ROWS"] == padded
    for launch in (p.prepare(num_rows), p.positive_sums(), p.attraction(of_columns=False)):
        assert launch.grid[0] * launch.constexprs["BLOCK_ROWS"] == padded
    finish = p.finish_gradient(num_rows)
    assert finish.grid[0] * finish.constexprs["BLOCK_ROWS"] >= num_rows


def test_columns_are_split_where_rows_are_few():
    split = triton_launch.num_splits
    assert split(owners=64, streamed=64, num_multiprocessors=132) == 2
    assert split(owners=132, streamed=132, num_multiprocessors=132) == 1
    assert split(owners=1000, streamed=1000, num_multiprocessors=132) == 1
    # No split of fewer than four tiles, and never none.
    assert split(owners=2, streamed=8, num_multiprocessors=132) == 2
    assert split(owners=1, streamed=1, num_multiprocessors=132) == 1
    assert split(owners=0, streamed=0, num_multiprocessors=132) == 1
    few = plan(num_rows=256, num_cols=65536)
    assert few.forward().grid == (2, 66)
    assert few.backward_splits(of_columns=True) == 1  # 512 blocks of columns own it


def test_wide_rows_divide_their_gradient():
    wide = plan(dim=2048)
    launch = wide.backward(of_columns=False)
    assert launch.grid[2] * launch.constexprs["SLICE"] == 2048
    assert plan(dim=256).backward(of_columns=False).grid[2] == 1


def test_the_gradient_of_the_columns_streams_the_rows():
    memory = plan(num_rows=256, num_cols=4096)
    rows, cols = (memory.backward(of_columns=c) for c in (False, True))
    assert rows.grid[0] * rows.constexprs["ROWS"] == 256
    assert cols.grid[0] * cols.constexprs["ROWS"] == 4096
    assert rows.constexprs["ROWS_ANCHOR"] and not rows.constexprs["COLS_ANCHOR"]
    assert cols.constexprs["COLS_ANCHOR"] and not cols.constexprs["ROWS_ANCHOR"]
    square = plan().backward(of_columns=False).constexprs
    assert square["ROWS_ANCHOR"] and square["COLS_ANCHOR"]


def test_the_forward_of_the_default_loss_never_looks_at_positives_in_pairs():
    assert not plan().forward().constexprs["BANDED"]
    assert plan(summation="in").forward().constexprs["BANDED"]


def test_the_shipped_launches_are_those_of_every_plan():
    shipped = {
        (launch.kernel, tuple(launch.constexprs.items()), launch.num_warps, launch.num_stages)
        for launch in launches("float16", 256, 80).values()
    }
    options = itertools.product(
        ("out", "in"), ("all", "one_positive", "only_negatives"), (True, False), (None, 77)
    )
    for summation, denominator, shifted, num_cols in options:
        p = plan(
            dtype="float16",
            dim=256,
            num_rows=77,
            num_cols=num_cols,
            target=Target(80, 108),
            shifted=shifted,
            summation=summation,
            denominator=denominator,
            normalize=shifted,
        )
        found = [p.forward(), p.backward(of_columns=False), p.finish_loss(), p.weights()]
        found += [p.prepare(77), p.finish_gradient(77)]
        found += [p.backward(of_columns=True)] if num_cols else []
        found += [p.one_positive()] if denominator == "one_positive" else []
        found += [p.positive_sums()] if p.sums_positives else []
        found += [p.attraction(of_columns=False)] if p.by_class else []
        found += [p.chunk_sums(77, weighted=w) for w in (False, True)] if p.by_class else []
        for launch in found:
            key = (
                launch.kernel,
                tuple(launch.constexprs.items()),
                launch.num_warps,
                launch.num_stages,
            )
            assert key in shipped


def test_float32_is_multiplied_in_one_product_of_tf32_only_where_asked():
    exact, fast = (plan(dtype="float32", tf32=tf32) for tf32 in (False, True))
    for p, precision in ((exact, "tf32x3"), (fast, "tf32")):
        for launch in (p.forward(), p.backward(of_columns=False)):
            assert launch.constexprs["PRECISION"] == precision
    assert fast.backward_tile.cols > exact.backward_tile.cols
    shipped = launches("tf32", 128, 80).values()
    assert fast.forward().constexprs in [launch.constexprs for launch in shipped]


def test_the_fastest_tile_is_found_by_its_neighbours():
    start, goal = Tile(64, 32, 16, 64, 4, 1), Tile(128, 64, 32, 32, 8, 3)
    names = [field.name for field in dataclasses.fields(Tile)]
    tried = []

    def seconds(tile):
        tried.append(tile)
        return sum(getattr(tile, name) != getattr(goal, name) for name in names)

    def seconds_or_failure(tile):
        return float("inf") if tile.num_warps == 8 else seconds(tile)

    # Stages one by one, of which the next is no better: what takes two steps is not found.
    found = triton_launch.fastest(start, 128, seconds)
    assert found == dataclasses.replace(goal, num_stages=1)
    assert len(tried) == len(set(tried))
    found = triton_launch.fastest(start, 128, seconds_or_failure)
    assert found == dataclasses.replace(goal, num_stages=1, num_warps=4)
    for tile in tried:
        assert 32 <= tile.rows <= 128 and tile.narrow <= tile.cols <= 128
        assert tile.narrow >= 16 and 128 % tile.chunk == 0 and 1 <= tile.num_stages <= 4


def test_architectures_share_limits():
    assert triton_launch.architecture(8, 0) == 80
    assert triton_launch.architecture(8, 6) == triton_launch.architecture(8, 9) == 86
    assert triton_launch.architecture(9, 0) == 90
    assert triton_launch.architecture(10, 3) == 100
    assert triton_launch.architecture(12, 0) == 86  # consumer cards have 99 KiB


def test_the_signatures_are_those_of_the_kernels():
    pytest.importorskip("triton", reason="triton is not installed")
    from supcon_kernels import triton_kernels

    for launch in launches().values():
        kernel = getattr(triton_kernels, launch.kernel)
        names = list(inspect.signature(kernel.fn).parameters)
        assert names == [*launch.signature, *(n for n in names if n in launch.constexprs)]
        assert {*launch.signature, *launch.constexprs} == {*names}
        assert {*launch.divisible_by_16} <= {*launch.signature}


def test_it_needs_neither_triton_nor_torch():
    code = """
import sys
sys.modules["triton"] = sys.modules["torch"] = None
sys.path.insert(0, "supcon_kernels")
import triton_launch
print(len(triton_launch.shipped_launches("bfloat16", 128, 90)))
"""
    root = triton_launch.__file__.removesuffix("supcon_kernels/triton_launch.py")
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == len(launches())
