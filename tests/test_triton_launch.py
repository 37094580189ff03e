"""The launch logic of the Triton kernels: grids, shares and tables, without a device or triton."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import subprocess
import sys

import pytest

from supcon_kernels import triton_launch, triton_tiles
from supcon_kernels.triton_launch import Launch, Plan
from supcon_kernels.triton_shares import Shares
from supcon_kernels.triton_shipped import shipped_launches
from supcon_kernels.triton_tiles import Target, Tile

DTYPES = ["float32", "float16", "bfloat16"]
DIMS = [0, 1, 16, 100, 128, 129, 256, 257, 384, 512, 1000, 2048]
FEW_DIMS = [129, 1000]
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
        fits=True,
        summation="out",
        denominator="all",
        normalize=True,
    )
    return dataclasses.replace(usual, **changes)


@functools.cache
def launches(dtype="bfloat16", dim=128, capability=90) -> dict[str, Launch]:
    return dict(shipped_launches(dtype, dim, capability))


@pytest.mark.parametrize("dim", DIMS)
def test_rows_are_padded_to_whole_chunks(dim):
    padded = triton_tiles.padded_dim(dim)
    assert dim <= padded < max(2 * dim, 65) and padded % 64 == 0


@pytest.mark.parametrize("dim", FEW_DIMS)
def test_tiles_divide_what_they_are_parts_of(dim):
    padded = triton_tiles.padded_dim(dim)
    for dtype, capability in itertools.product([*DTYPES, "tf32"], [0, *CAPABILITIES]):
        for launch in launches(dtype, dim, capability).values():
            sizes = launch.constexprs
            if "CHUNK" in sizes:
                assert padded % sizes["CHUNK"] == 0
                for name in ("ROWS", "COLS", "CHUNK"):
                    assert sizes[name] >= 16 and sizes[name] & (sizes[name] - 1) == 0
                assert triton_tiles.ROW_PADDING % sizes["ROWS"] == 0
                assert triton_tiles.ROW_PADDING % sizes["COLS"] == 0
            elif "ROWS" in sizes and launch.kernel == "_gradient_kernel":
                assert sizes["ROWS"] % sizes["BLOCK_ROWS"] == 0
            assert ("maxnreg" in launch.options) == (capability == 100)


@pytest.mark.parametrize("num_rows", [0, 1, 127, 128, 129, 8192, 100_000])
def test_grids_cover_all_rows(num_rows):
    p = plan(num_rows=num_rows)
    padded = triton_tiles.padded_rows(num_rows)
    assert padded >= max(num_rows, 1) and padded % triton_tiles.ROW_PADDING == 0
    small = [p.prepare(num_rows), p.gradient(num_rows, dots=False)]
    for launch in (*small, p.weights(num_rows)):
        assert launch.grid[0] * launch.constexprs["BLOCK_ROWS"] == padded
    for launch, shares in (
        (p.forward(False), p.forward_shares(False)),
        (p.backward(False), p.backward_shares(False)),
    ):
        assert launch.grid[0] == shares.num_programs
        assert shares.num_blocks * launch.constexprs["ROWS"] == padded
        assert shares.num_tiles * launch.constexprs["COLS"] == padded


@pytest.mark.parametrize("num_rows, programs", [(0, 1), (1024, 1), (4096, 4), (65536, 64)])
def test_anchors_have_several_programs(num_rows, programs):
    assert plan(num_rows=num_rows).loss("mean", num_rows).grid == (programs, 1, 1)


@pytest.mark.parametrize("dim", DIMS)
def test_many_rows_read_all_labels_less_often(dim):
    few, many = (plan(dim=dim).prepare(num_rows) for num_rows in (256, 4096))
    for launch in (few, many):
        rows, width = launch.constexprs["BLOCK_ROWS"], launch.constexprs["WIDTH"]
        assert triton_tiles.ROW_PADDING % rows == 0
        assert rows * width <= 32 * 32 * launch.num_warps  # comparisons
    assert many.constexprs["BLOCK_ROWS"] >= few.constexprs["BLOCK_ROWS"]
    assert dim != 128 or (many.constexprs["BLOCK_ROWS"], few.constexprs["BLOCK_ROWS"]) == (16, 4)


def pieces_by_block(shares: Shares) -> list[int]:
    """In how many pieces each block is done, by going through the programs as the kernels do."""
    done = [[] for _ in range(shares.num_blocks)]
    runs = -(-shares.group * shares.num_tiles // shares.share)
    for program in range(shares.num_programs):
        start, run = program // runs * shares.group, program % runs
        first = run * shares.share
        tiles = min(shares.group, shares.num_blocks - start) * shares.num_tiles
        last = min(first + shares.share, tiles)
        assert first < last
        for block in range(first // shares.num_tiles, -(-last // shares.num_tiles)):
            before = block * shares.num_tiles
            # What the kernels take to be the number of the piece.
            assert run - before // shares.share == len(done[start + block])
            begin, end = max(first - before, 0), min(last - before, shares.num_tiles)
            done[start + block].append(range(begin, end))
    for block, pieces in enumerate(done):
        assert [tile for piece in pieces for tile in piece] == list(range(shares.num_tiles))
        assert shares.pieces_of(block) == len(pieces)
    return [len(pieces) for pieces in done]


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 64), (33, 2), (2, 100), (7, 8)])
@pytest.mark.parametrize("share", [1, 2, 4, 5, 8, 16, 1000])
def test_shares_are_whole_and_their_pieces_are_counted(shape, share):
    for group in {1, min(2, shape[0]), shape[0]}:
        shares = Shares(*shape, group, share)
        assert max(pieces_by_block(shares)) == shares.max_pieces


# Multiprocessors by the architecture that has them, the A100's, the H100's and the B200's.
CARDS = {80: 108, 90: 132, 100: 148}


@pytest.mark.parametrize("capability", CARDS)
def test_every_multiprocessor_has_as_much_to_do(capability):
    """In at most four pieces a block, but where so many programs cannot have as much to do.

    4,096 rows are 64 blocks: four pieces of each are 256 programs, and a B200 has places for 296.
    """
    # On H100 a piece of 64 rows of 128 features takes about 1,400 clocks to be written, its share of
    # the L2 cache's bandwidth, and a tile of 64×128 pairs 1,024 to be multiplied twice.
    target = Target(capability, CARDS[capability])
    for num_rows in range(4096, 65536 + 1, 128):
        p = plan(num_rows=num_rows, target=target)
        for shares, tile in (
            (p.forward_shares(False), p.forward_tile(False)),
            (p.backward_shares(False), p.backward_tile(False)),
        ):
            slots = target.num_multiprocessors * tile.residents
            # Of an H200's 128×128 pairs a forward of few rows has too few for every program.
            most = 1.22 if tile.rows == 128 and num_rows <= 5120 else 1.15
            assert shares.slowdown(slots, piece_tiles=1.4 * 128 / tile.cols) <= most, num_rows
            pieces = 4 * tile.rows // 64  # of sums alone; a forward's of 128 rows are small
            fewest = -(-shares.num_tiles // pieces) * slots
            fewest /= shares.num_blocks * shares.num_tiles
            assert shares.max_pieces <= pieces or fewest > 1.15, num_rows
            assert shares.max_pieces <= pieces or num_rows <= 4224


def test_few_tiles_are_not_torn_apart():
    tile = Tile(64, 128, 128, 4, 2, 2)
    assert Shares.of(128, 128, tile, 264).num_programs == 1
    assert Shares.of(8192, 8192, tile, 264).num_programs == 256  # of 32 tiles
    few = plan(num_rows=256, num_cols=65536)
    assert 250 <= few.forward(False).grid[0] <= 264
    assert few.backward_shares(False, of_columns=True).max_pieces <= 2


def test_who_writes_blocks():
    assert [plan(dim=dim).is_wide for dim in (256, 257)] == [False, True]
    assert plan(dtype="float32").is_wide
    ampere = Target(80, 108)
    for dim in (128, 129):
        assert plan(dim=dim, dtype="float32", target=ampere).is_wide == (dim == 129)
    launch = plan(dim=8192).derivatives(False, 1024, 512)
    tile = launch.constexprs
    assert launch.grid == (512 // tile["COLS"] * (1024 // tile["ROWS"]), 1, 1)
    assert plan(dim=8192).prepare(64).num_warps == 32


@pytest.mark.parametrize("dtype, size", [("bfloat16", 2), ("float32", 4)])
@pytest.mark.parametrize("shape", [(1, 1), (8192, 8192), (64, 10**7), (10**5, 10**5)])
@pytest.mark.parametrize("workspace", [0, 2**20, 2**28])
def test_blocks_fit_their_workspace(dtype, size, shape, workspace):
    p = plan(dim=768, dtype=dtype, num_rows=shape[0], num_cols=shape[1])
    rows, cols = p.blocks(workspace)
    assert rows % triton_tiles.ROW_PADDING == cols % triton_tiles.ROW_PADDING == 0
    assert min(rows, cols) >= triton_tiles.ROW_PADDING
    assert rows * cols * size <= max(workspace, size * triton_tiles.ROW_PADDING**2)
    if workspace == 2**28 and shape == (8192, 8192):
        assert (rows, cols) == (8192, 8192)  # one block


def test_who_is_an_anchor():
    memory = plan(num_rows=256, num_cols=4096)
    rows, cols = (memory.backward(False, of_columns=c).constexprs for c in (False, True))
    assert rows["ROWS_ANCHOR"] and not rows["COLS_ANCHOR"]
    assert cols["COLS_ANCHOR"] and not cols["ROWS_ANCHOR"]
    for launch in (plan().backward(False), memory.backward(False, both_anchor=True)):
        assert launch.constexprs["ROWS_ANCHOR"] and launch.constexprs["COLS_ANCHOR"]


def test_where_a_maximum_is_kept():
    assert plan().running == (False,)
    assert plan(fits=False).running == (True,)
    assert plan(fits=None).running == (False, True)  # the device decides
    assert plan(fits=None, normalize=False).running == (True,)
    assert triton_launch.powers_fit(0.023) and triton_launch.powers_fit(4.0)
    assert not triton_launch.powers_fit(0.0229) and not triton_launch.powers_fit(4.1)


def test_both_kernels_leave_their_pieces_in_the_same_places():
    every = itertools.product(CAPABILITIES, (64, 256, 1024), DTYPES, (False, True))
    for capability, dim, dtype, symmetric in every:
        target = Target(capability, 100)
        sides = {"num_rows": 1024, "symmetric": symmetric}
        p = plan(fits=None, dim=dim, dtype=dtype, target=target, **sides)
        kinds = [(p.forward_tile, p.forward_shares), (p.backward_tile, p.backward_shares)]
        for tile_of, shares_of in kinds[: 1 if p.is_wide else 2]:
            fast, slow = (tile_of(running) for running in p.running)
            assert fast.rows == slow.rows and fast.cols % slow.cols == 0
            pieces = [pieces_by_block(shares_of(running)) for running in p.running]
            assert pieces[0] == pieces[1]
            assert len({shares_of(running).max_pieces for running in p.running}) == 1


def test_the_shipped_launches_are_those_of_every_plan():
    shipped = {launch.code for launch in launches("float16", 256, 80).values()}
    options = itertools.product(
        ("out", "in"),
        ("all", "one_positive", "only_negatives"),
        (True, False, None),
        (None, 77),
        (True, False),
    )
    for summation, denominator, fits, num_cols, normalize in options:
        p = plan(
            dtype="float16",
            dim=256,
            num_rows=77,
            num_cols=num_cols,
            target=Target(80, 108),
            fits=None if fits is None else fits and normalize,
            summation=summation,
            denominator=denominator,
            normalize=normalize,
        )
        found = [p.loss("mean", 77), p.weights(77), p.gradient(77, dots=True)]
        found += [p.prepare(77), p.temperature_gradient()]
        for running in p.running:
            found += [p.forward(running), p.backward(running)]
            found += [p.backward(running, of_columns=True)] if num_cols else []
            found += [p.forward(running, first_look=True)] if denominator == "one_positive" else []
        for launch in found:
            assert launch.code in shipped


def test_the_forward_of_both_directions_is_shipped_where_rows_are_wide():
    shipped = {launch.code for launch in launches("bfloat16", 512, 90).values()}
    p = plan(dim=512, num_rows=77, num_cols=77, target=Target(90, 132), fits=None, symmetric=True)
    one_way = dataclasses.replace(p, symmetric=False)
    for running in p.running:
        assert p.forward(running).code in shipped
        assert p.forward(running).code != one_way.forward(running).code
    p = dataclasses.replace(p, denominator="one_positive")
    for running, first_look in itertools.product(p.running, (True, False)):
        assert p.forward(running, first_look=first_look).code in shipped


def test_one_forward_has_both_directions_where_its_sums_take_no_more_than_the_backward():
    def both(num_rows, num_cols, **changes):
        sides = {"num_rows": num_rows, "num_cols": num_cols, "symmetric": True}
        changes = {"dim": 512, "dtype": "bfloat16", "target": Target(90, 132), **changes}
        return plan(**sides, **changes).both

    assert both(77, 77) and both(65536, 65536) and both(2**20, 2**20) and both(256, 2**24)
    assert not both(2**15, 2**24, dim=384)
    # It looks at the pairs twice, with sums of each look.
    assert both(65536, 65536, denominator="one_positive")
    assert both(8192, 2**18, dim=384)
    assert not both(8192, 2**18, dim=384, denominator="one_positive")


def test_float32_is_multiplied_in_one_product_of_tf32_only_where_asked():
    ampere = Target(80, 108)
    exact, fast = (plan(dtype="float32", tf32=tf32, target=ampere) for tf32 in (False, True))
    for p, precision in ((exact, "tf32x3"), (fast, "tf32")):
        for launch in (p.forward(False), p.backward(False)):
            assert launch.constexprs["PRECISION"] == precision
    assert fast.backward_tile(False).cols > exact.backward_tile(False).cols
    shipped = launches("tf32", 128, 80).values()
    assert fast.forward(False).constexprs in [launch.constexprs for launch in shipped]


def test_architectures_share_limits():
    assert triton_tiles.architecture(8, 0) == 80
    assert triton_tiles.architecture(8, 6) == triton_tiles.architecture(8, 9) == 86
    assert triton_tiles.architecture(9, 0) == 90
    assert triton_tiles.architecture(10, 3) == 100
    assert triton_tiles.architecture(12, 0) == 86  # consumer cards have 99 KiB


def test_the_signatures_are_those_of_the_kernels():
    pytest.importorskip("triton", reason="triton is not installed")
    from supcon_kernels import kernels

    for launch in launches().values():
        kernel = getattr(kernels, launch.kernel)
        names = list(inspect.signature(kernel.fn).parameters)
        assert names == [*launch.signature, *(n for n in names if n in launch.constexprs)]
        assert {*launch.signature, *launch.constexprs} == {*names}
        assert {*launch.divisible_by_16} <= {*launch.signature}


def test_it_needs_neither_triton_nor_torch():
    code = """
import sys, types
sys.modules["triton"] = sys.modules["torch"] = None
package = sys.modules["supcon_kernels"] = types.ModuleType("supcon_kernels")
package.__path__ = ["supcon_kernels"]
from supcon_kernels.triton_shipped import shipped_launches
print(len(shipped_launches("bfloat16", 128, 90)))
"""
    root = triton_launch.__file__.removesuffix("supcon_kernels/triton_launch.py")
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == len(launches())
