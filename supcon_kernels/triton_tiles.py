"""What a program of a pair kernel works on at a time: tables of tiles, by architecture, width and dtype."""

from __future__ import annotations

import dataclasses

# Rows of a side, zeros behind the last, so that no tile of any pair kernel needs a mask to load.
ROW_PADDING = 128
MAX_DIM = 8192


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a program of a pair kernel works on at a time.

    Attributes:
        rows: rows of a block.
        cols: columns that are streamed at a time.
        chunk: features multiplied at a time; all where there are no more.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        residents: programs that a multiprocessor holds: one's exponentials run beside another's products.
    """

    rows: int
    cols: int
    chunk: int
    num_warps: int
    num_stages: int
    residents: int = 1


@dataclasses.dataclass(frozen=True)
class Target:
    """Where the kernels run.

    Attributes:
        capability: compute capability as 80, 86, 90, 100; 0 under the interpreter.
        num_multiprocessors: of the device.
    """

    capability: int
    num_multiprocessors: int


INTERPRETER = Target(capability=0, num_multiprocessors=1)


def architecture(major: int, minor: int) -> int:
    """The architecture whose limits a device of this compute capability shares."""
    if major in (9, 10):
        return major * 10
    return 80 if (major, minor) == (8, 0) else 86


def padded_dim(dim: int) -> int:
    """Features of a padded row: 64, whose products exponentials hide, 128, and then whole chunks."""
    return 64 if dim <= 64 else cdiv(dim, 128) * 128


def padded_rows(num_rows: int) -> int:
    """Rows of a side with the zeros behind them; never none, so that it has an address."""
    return max(cdiv(num_rows, ROW_PADDING), 1) * ROW_PADDING


@dataclasses.dataclass(frozen=True)
class Row:
    """A tile, where it applies, and why it is as it is.

    Attributes:
        products: how numbers are multiplied.
        max_dim: widest padded rows.
        capabilities: architectures.
        tile: the tile; a chunk wider than the rows is all of a row.
        why: what decided.
        lean: only for the default loss, whose powers fit.
        min_rows: anchors from which on it applies: fewer have too few large tiles for all programs.
    """

    products: str
    max_dim: int
    capabilities: tuple[int, ...]
    tile: Tile
    why: str
    lean: bool = False
    min_rows: int = 0


MANY_ROWS = 4096
_INTERPRETED = Tile(32, 32, 64, 4, 1)  # small enough for several tiles of 100 rows
_ALL, _MMA = (80, 86, 90, 100), (80, 86)
# How numbers are multiplied: 16-bit ones as they are, float32 in three products of TF32, or in one.
SHORT, TF32X3, TF32 = "16 bits", "tf32x3", "tf32"

# On sm_90 why names what was measured on an H200, in gpu_h200.jsonl of benchmarks/results.
FORWARD = (
    Row(SHORT, 128, (90,), Tile(128, 128, 128, 4, 2, 2), "fastest of 46", True, MANY_ROWS),
    Row(SHORT, 128, (90,), Tile(128, 64, 128, 8, 3, 2), "rows as above", False, MANY_ROWS),
    Row(SHORT, 128, (90,), Tile(64, 128, 128, 4, 2, 2), "fewest instructions", lean=True),
    Row(SHORT, 64, (80,), Tile(64, 64, 64, 4, 2, 2), "two programs", lean=True),
    Row(SHORT, 64, (80,), Tile(64, 32, 64, 4, 2, 2), "64 columns of some losses spill"),
    Row(SHORT, 128, _ALL, Tile(64, 64, 128, 4, 2, 2), "two programs, of two exponentials too"),
    Row(SHORT, 256, (90,), Tile(128, 64, 256, 4, 1, 2), "fastest of 51", True, MANY_ROWS),
    Row(SHORT, 256, (90,), Tile(128, 64, 64, 8, 3, 2), "rows as above", False, MANY_ROWS),
    Row(SHORT, MAX_DIM, (90,), Tile(128, 128, 64, 4, 3, 2), "128 columns", True, MANY_ROWS),
    Row(SHORT, MAX_DIM, (90,), Tile(128, 128, 64, 8, 3, 2), "two exponentials", False, MANY_ROWS),
    Row(SHORT, MAX_DIM, _ALL, Tile(64, 64, 64, 4, 3, 2), "two programs"),
    Row(TF32X3, MAX_DIM, (90,), Tile(128, 128, 32, 8, 3, 2), "fastest of 33", True, MANY_ROWS),
    Row(TF32X3, MAX_DIM, (90,), Tile(128, 64, 32, 8, 3, 2), "two exponentials", False, MANY_ROWS),
    Row(TF32X3, MAX_DIM, _ALL, Tile(64, 64, 16, 4, 2), "TF32's parts are in registers"),
    Row(TF32, MAX_DIM, (90,), Tile(128, 128, 32, 8, 3, 2), "as three products", True, MANY_ROWS),
    Row(TF32, MAX_DIM, (90,), Tile(128, 64, 32, 8, 3, 2), "as three products", False, MANY_ROWS),
    Row(TF32, MAX_DIM, (100,), Tile(64, 64, 32, 4, 3, 2), "two stages spill"),
    Row(TF32, MAX_DIM, _ALL, Tile(64, 64, 32, 4, 2, 2), "two programs"),
)
# Of a forward that also has the sums of the columns.
FORWARD_BOTH = (
    Row(SHORT, MAX_DIM, (90,), Tile(128, 64, 64, 8, 3, 2), "sums of 128 columns spill"),
    Row(TF32X3, MAX_DIM, (90,), Tile(128, 64, 32, 8, 3, 2), "as 16 bits"),
    Row(TF32, MAX_DIM, (90,), Tile(128, 64, 32, 8, 3, 2), "as 16 bits"),
    Row(SHORT, MAX_DIM, (86, 100), Tile(64, 64, 64, 8, 3), "four warps spill"),
    Row(TF32X3, MAX_DIM, (100,), Tile(64, 64, 64, 8, 3), "as 16 bits"),
    Row(TF32, MAX_DIM, (86, 100), Tile(64, 64, 32, 8, 2), "with 64 features some spill"),
    *(row for row in FORWARD if not row.lean and not row.min_rows),
)
# Of one that also looks twice: the second look at 64 columns spills.
FORWARD_BOTH_TWICE = (
    Row(SHORT, MAX_DIM, _ALL, Tile(64, 32, 64, 4, 3), "few registers"),
    Row(TF32X3, MAX_DIM, _ALL, Tile(64, 32, 16, 4, 2), "few registers"),
    Row(TF32, MAX_DIM, _ALL, Tile(64, 32, 32, 4, 2), "few registers"),
)
BACKWARD = (
    Row(SHORT, 128, (80, 90), Tile(64, 128, 128, 4, 2, 2), "two programs", lean=True),
    Row(SHORT, 128, (86,), Tile(64, 64, 128, 4, 2, 2), "two programs in 99 KiB", lean=True),
    Row(SHORT, 64, (86,), Tile(64, 32, 64, 4, 2, 2), "three stages spill"),
    Row(SHORT, 128, (100,), Tile(64, 32, 64, 4, 3, 2), "with 128 features some spill"),
    Row(SHORT, 128, _ALL, Tile(64, 32, 128, 4, 3, 2), "two exponentials: 64 columns spill"),
    Row(SHORT, 256, (90,), Tile(128, 64, 256, 8, 3), "fastest of 21, within 1 %", lean=True),
    Row(SHORT, 256, _MMA, Tile(64, 32, 256, 8, 2), "gradient: half a thread"),
    Row(SHORT, 256, (90,), Tile(128, 32, 64, 8, 3), "with 256 features 64 columns spill"),
    Row(TF32X3, 128, (86,), Tile(64, 16, 32, 4, 2, 2), "as below; 16 features spill"),
    Row(TF32X3, 128, (80, 100), Tile(64, 16, 16, 4, 1, 2), "TF32's parts are in registers"),
    Row(TF32, 128, (86,), Tile(64, 32, 32, 4, 3, 2), "as below; two stages spill"),
    Row(TF32, 128, (80, 100), Tile(64, 32, 32, 4, 2, 2), "gradient: half a thread"),
)
DERIVATIVES = (
    Row(SHORT, MAX_DIM, (90,), Tile(64, 128, 64, 4, 3, 3), "fastest of 30", lean=True),
    Row(SHORT, MAX_DIM, (80,), Tile(128, 128, 64, 8, 3), "few reads of a feature", lean=True),
    Row(SHORT, MAX_DIM, (100,), Tile(128, 64, 64, 8, 3), "128 columns spill", lean=True),
    Row(SHORT, MAX_DIM, (100,), Tile(64, 32, 64, 4, 3, 2), "64 columns of some losses spill"),
    Row(SHORT, MAX_DIM, _ALL, Tile(128, 64, 64, 8, 3), "99 KiB; 128 columns of others spill"),
    Row(TF32X3, MAX_DIM, (90,), Tile(64, 128, 32, 4, 3, 3), "fastest of 33", lean=True),
    Row(TF32X3, MAX_DIM, (90,), Tile(64, 64, 32, 4, 2, 3), "registers for a second exponential"),
    Row(TF32X3, MAX_DIM, (100,), Tile(64, 32, 16, 4, 2), "64 columns of some losses spill"),
    Row(TF32X3, MAX_DIM, _ALL, Tile(64, 64, 16, 4, 2), "TF32's parts are in registers"),
    Row(TF32, MAX_DIM, (100,), Tile(64, 32, 32, 4, 3, 2), "64 columns of some losses spill"),
    Row(TF32, MAX_DIM, _ALL, Tile(64, 64, 32, 4, 2, 2), "two programs"),
)


def tile_of(
    table: tuple[Row, ...], products: str, padded: int, capability: int, lean: bool, num_rows: int
) -> Tile:
    """The tile of the first row that applies, for ``num_rows`` anchors of ``padded`` features."""
    tile = _INTERPRETED
    if capability:
        tile = next(
            row.tile
            for row in table
            if row.products == products
            and padded <= row.max_dim
            and capability in row.capabilities
            and (lean or not row.lean)
            and num_rows >= row.min_rows
        )
    return dataclasses.replace(tile, chunk=min(tile.chunk, padded))


def is_wide(dim: int, dtype: str = "bfloat16", capability: int = 90) -> bool:
    """Whether a block of rows' gradient is too large for a program to hold beside its products."""
    if dtype == "float32" and capability == 90:
        return True  # on an H200 less than half the time of products in registers
    # What leaves tensor memory takes all registers.
    widest = 128 if capability == 100 or dtype == "float32" else 256
    return padded_dim(dim) > widest
