"""How the Triton kernels are launched: block sizes, warps, stages, grids and column splits.

Pure functions of metadata. Nothing here needs triton or a device, and the backend launches
through these very objects, so what a test or a compiler is given is what ships.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import ParamSpec, cast

# Rows of a side, zeros behind the last, so that no tile of any pair kernel needs a mask to load.
ROW_PADDING = 128
# Rows whose sum is kept, so that the sum of a class costs its length over this.
CHUNK_ROWS = 64
MAX_DIM = 2048
# Rows and features of a program that goes from class to class.
CLASS_ROWS, CLASS_DIM = 32, 32
# Tiles of columns below which another split costs more than it brings.
MIN_TILES_OF_SPLIT = 4

Constexpr = int | bool | str
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch of a kernel: everything but the values of its runtime arguments.

    Attributes:
        kernel: name of a ``@triton.jit`` function in ``triton_kernels``.
        signature: runtime argument -> triton type, such as "*bf16" or "i32", in order.
        constexprs: compile-time argument -> value.
        divisible_by_16: runtime arguments known to be multiples of 16.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        grid: programs along each axis.
    """

    kernel: str
    signature: dict[str, str]
    constexprs: dict[str, Constexpr]
    divisible_by_16: tuple[str, ...]
    num_warps: int
    num_stages: int
    grid: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a program of a pair kernel works on at a time.

    Attributes:
        rows: rows that it owns.
        cols: columns that it streams at a time.
        narrow: columns at a time where pairs are told apart, which takes registers.
        chunk: features multiplied at a time; all where there are no more.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
    """

    rows: int
    cols: int
    narrow: int
    chunk: int
    num_warps: int
    num_stages: int


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
    """Features of a padded row: a power of two up to 256, then whole chunks."""
    if dim <= 256:
        return max(16, 1 << (dim - 1).bit_length()) if dim > 0 else 16
    return _round_up(dim, 128)


def padded_rows(num_rows: int) -> int:
    """Rows of a side with the zeros behind them; never none, so that it has an address."""
    return max(_round_up(num_rows, ROW_PADDING), ROW_PADDING)


def num_splits(owners: int, streamed: int, num_multiprocessors: int) -> int:
    """Into how many parts the columns go where the row blocks alone leave multiprocessors idle.

    Args:
        owners: programs without a split.
        streamed: tiles of columns.
        num_multiprocessors: of the device.
    """
    wanted = num_multiprocessors // max(owners, 1)
    return max(1, min(wanted, streamed // MIN_TILES_OF_SPLIT))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


# --- the tables: the first row that applies


@dataclasses.dataclass(frozen=True)
class _Row:
    """A tile, where it applies, and why it is as it is.

    Attributes:
        products: how numbers are multiplied.
        max_dim: widest padded rows.
        capabilities: architectures.
        tile: the tile; a chunk wider than the rows is all of a row.
        why: what decided.
        lean: only where positives come from sums over classes, but for the few of a small class, and
            where sums need no maximum, which takes fewer registers.
    """

    products: str
    max_dim: int
    capabilities: tuple[int, ...]
    tile: Tile
    why: str
    lean: bool = False


_INTERPRETED = Tile(32, 32, 16, 64, 4, 1)  # small enough for several tiles of 100 rows
_ALL, _MMA, _WGMMA = (80, 86, 90, 100), (80, 86), (90, 100)
# How numbers are multiplied: 16-bit ones as they are, float32 in three products of TF32, or in one.
_SHORT, _TF32X3, _TF32 = "16 bits", "tf32x3", "tf32"

_FORWARD = (
    _Row(_SHORT, 128, (86,), Tile(128, 128, 32, 128, 8, 2), "three stages exceed 99 KiB"),
    _Row(_SHORT, 128, _ALL, Tile(128, 128, 32, 128, 8, 3), "a row stays in registers or is shared"),
    _Row(_SHORT, MAX_DIM, (86,), Tile(128, 128, 32, 64, 8, 2), "as below, in 99 KiB"),
    _Row(_SHORT, MAX_DIM, _ALL, Tile(128, 128, 32, 64, 8, 3), "square tiles load least"),
    _Row(_TF32X3, MAX_DIM, _ALL, Tile(64, 64, 16, 16, 4, 2), "TF32's parts are in registers"),
    _Row(_TF32, 64, (100,), Tile(128, 128, 16, 32, 8, 2), "as below; 32 narrow columns spill"),
    _Row(_TF32, MAX_DIM, _ALL, Tile(128, 128, 32, 32, 8, 2), "square tiles load least"),
)
_BACKWARD = (
    _Row(_SHORT, 128, _WGMMA, Tile(128, 128, 32, 128, 8, 2), "fewest instructions", lean=True),
    _Row(_SHORT, 128, _MMA, Tile(64, 128, 32, 128, 4, 2), "128 rows spill", lean=True),
    _Row(_SHORT, 128, _WGMMA, Tile(128, 64, 16, 128, 8, 2), "two exponentials: 128 columns spill"),
    _Row(_SHORT, 128, _MMA, Tile(64, 64, 32, 128, 4, 2), "two exponentials: 128 columns spill"),
    _Row(_SHORT, 256, _WGMMA, Tile(128, 64, 32, 256, 8, 2), "gradient: half a thread", lean=True),
    _Row(_SHORT, 256, (86,), Tile(64, 64, 16, 256, 4, 1), "two stages spill", lean=True),
    _Row(_SHORT, 256, (80,), Tile(64, 64, 16, 256, 4, 2), "gradient: half a thread", lean=True),
    _Row(_SHORT, MAX_DIM, _WGMMA, Tile(128, 64, 16, 64, 8, 3), "with 256 features rows spill"),
    _Row(_SHORT, MAX_DIM, (80,), Tile(64, 64, 32, 64, 4, 3), "as on sm_90", lean=True),
    _Row(_SHORT, MAX_DIM, _MMA, Tile(64, 32, 16, 64, 4, 3), "with 256 features 64 columns spill"),
    _Row(_TF32X3, 64, (80,), Tile(64, 16, 16, 16, 4, 2), "one stage spills"),
    _Row(_TF32X3, MAX_DIM, (100,), Tile(64, 16, 16, 16, 4, 2), "one stage spills"),
    _Row(_TF32X3, MAX_DIM, _ALL, Tile(64, 16, 16, 16, 4, 1), "TF32's parts are in registers"),
    _Row(_TF32, MAX_DIM, _ALL, Tile(64, 64, 16, 32, 4, 2), "gradient: half a thread"),
)


def _find(table: tuple[_Row, ...], plan: Plan, lean: bool) -> Tile:
    padded, capability = padded_dim(plan.dim), plan.target.capability
    tile = _INTERPRETED
    if capability:
        tile = next(
            row.tile
            for row in table
            if row.products == plan.products
            and padded <= row.max_dim
            and capability in row.capabilities
            and (lean or not row.lean)
        )
    return dataclasses.replace(tile, chunk=min(tile.chunk, padded))


def fastest(tile: Tile, dim: int, seconds: Callable[[Tile], float]) -> Tile:
    """The best tile that is found by going from ``tile`` to a faster neighbour as long as there is one.

    Args:
        tile: where to start.
        dim: D.
        seconds: how long a tile takes; infinity where it cannot be launched.
    """
    best, shortest, tried = tile, seconds(tile), {tile}
    while True:
        times = {t: seconds(t) for t in _neighbours(best, dim) if t not in tried}
        tried |= times.keys()
        found = min(times, key=times.__getitem__, default=best)
        if not times or times[found] >= shortest:
            return best
        best, shortest = found, times[found]


def _neighbours(tile: Tile, dim: int) -> list[Tile]:
    """Tiles that differ in one thing, as far as the kernels take them."""

    def halved_and_doubled(name: str, low: int, high: int) -> list[Tile]:
        size = getattr(tile, name)
        sizes = [s for s in (size // 2, size * 2) if low <= s <= high]
        return [dataclasses.replace(tile, **{name: s}) for s in sizes]

    found = halved_and_doubled("rows", 32, ROW_PADDING)
    found += halved_and_doubled("cols", tile.narrow, ROW_PADDING)
    found += halved_and_doubled("narrow", 16, tile.cols)
    found += [t for t in halved_and_doubled("chunk", 16, 256) if padded_dim(dim) % t.chunk == 0]
    found += halved_and_doubled("num_warps", 4, 8)
    stages = [s for s in (tile.num_stages - 1, tile.num_stages + 1) if 1 <= s <= 4]
    return found + [dataclasses.replace(tile, num_stages=s) for s in stages]


def slice_of(dim: int, dtype: str = "bfloat16") -> int:
    """Features of the gradient that one program of the backward owns."""
    padded, widest = padded_dim(dim), 1024 // (2 * _BYTES[dtype])
    return padded if padded <= widest else widest if padded % widest == 0 else 128


# --- one call


_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
# Runtime arguments by type; those of the features' dtype and plain numbers are not listed.
_ARGUMENT_TYPES = {
    "*fp32": "poison scale powers logits peak loss contributes upstream weights "
    "row_weights col_weights row_pull col_pull slices",
    "*fp64": "factor sums weighted_sums totals stats dots",
    "*i64": "order num_valid num_valid_rows num_valid_cols",
    "*i32": "begin end own",
}
# Tensors of the caller, which may begin anywhere.
_UNALIGNED = ("features_ptr", "upstream_ptr")


_P = ParamSpec("_P")


def _remembered(launch: Callable[_P, Launch]) -> Callable[_P, Launch]:
    """A training step asks for the same launches again and again: it shall not wait for them."""
    return cast(Callable[_P, Launch], functools.lru_cache(maxsize=1024)(launch))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every launch of one call, forward and backward.

    Attributes:
        dtype: of the features and of the products: "float32", "float16" or "bfloat16".
        dim: D.
        num_rows: anchors N.
        num_cols: contrasts M, or None where the rows are contrasted with each other.
        target: where it runs.
        shifted: whether a temperature known to the host keeps sums of powers within range.
        summation, denominator, normalize: as in ``Problem``.
        tf32: whether one product of TF32 stands for one of float32.
        measured: the forward's and the backward's tile, where they were chosen by measurement.
    """

    dtype: str
    dim: int
    num_rows: int
    num_cols: int | None
    target: Target
    shifted: bool
    summation: str
    denominator: str
    normalize: bool
    tf32: bool = False
    measured: tuple[Tile, Tile] | None = None

    @property
    def products(self) -> str:
        """How numbers are multiplied."""
        if self.dtype != "float32":
            return _SHORT
        return _TF32 if self.tf32 else _TF32X3

    @property
    def forward_tile(self) -> Tile:
        """Of the kernels that only multiply rows with columns."""
        return self.measured[0] if self.measured else _find(_FORWARD, self, False)

    @property
    def backward_tile(self) -> Tile:
        """Of the kernel that also multiplies with what it made of the products."""
        lean = self.shifted and self.by_class
        return self.measured[1] if self.measured else _find(_BACKWARD, self, lean)

    @property
    def square(self) -> bool:
        """Whether the rows are contrasted with each other."""
        return self.num_cols is None

    @property
    def by_class(self) -> bool:
        """Whether positives come from sums over classes, all in the loss, and most in the gradient."""
        return self.summation == "out" and self.denominator == "all"

    @property
    def sums_positives(self) -> bool:
        """Whether the loss takes the mean similarity of the positives, another sum over classes."""
        return self.summation == "out" and self.denominator != "one_positive"

    @property
    def num_totals(self) -> int:
        """Blocks of features into which the sums over classes are divided."""
        return _cdiv(padded_dim(self.dim), self._class_block)

    @property
    def forward_splits(self) -> int:
        """Parts of the columns in the forward kernel."""
        return self._splits(self.num_rows, self._contrasts, self.forward_tile, 1)

    def backward_splits(self, of_columns: bool) -> int:
        """Parts of the streamed side in the backward kernel of the rows, or of the columns."""
        owners, streamed = self._sides(of_columns)
        slices = padded_dim(self.dim) // slice_of(self.dim, self.dtype)
        return self._splits(owners, streamed, self.backward_tile, slices)

    # --- the small kernels

    @_remembered
    def prepare(self, num_rows: int) -> Launch:
        """Sorts, normalises, scales, rounds and pads a side of ``num_rows``."""
        return self._launch(
            "_prepare_kernel",
            "features order num_valid rows poison num_rows dim fold",
            {"NORMALIZE": self.normalize, "TF32": self.tf32, **self._row_block},
            (padded_rows(num_rows) // self._row_block["BLOCK_ROWS"],),
        )

    @_remembered
    def finish_gradient(self, num_rows: int) -> Launch:
        """Adds up slices and goes back through normalisation and sorting."""
        # Found by compiling; a single row leaves too little for so many warps.
        spills = self.target.capability == 100 and self._row_block["BLOCK_ROWS"] > 1
        return self._launch(
            "_finish_gradient_kernel",
            "slices features rows order num_valid factor gradient dots num_rows dim num_slices "
            "padded_rows",
            {"NORMALIZE": self.normalize, **self._row_block},
            (_cdiv(num_rows, self._row_block["BLOCK_ROWS"]),),
            num_warps=8 if spills else 4,
        )

    @_remembered
    def chunk_sums(self, num_rows: int, *, weighted: bool) -> Launch:
        """Sums of chunks of the rows that attract."""
        return self._launch(
            "_chunk_sums_kernel",
            "rows weights sums",
            {"WEIGHTED": weighted, **self._class_blocks(rows=False)},
            (padded_rows(num_rows) // CHUNK_ROWS, self.num_totals),
        )

    @_remembered
    def positive_sums(self) -> Launch:
        """Σ over the positives of row · col."""
        blocks = self._class_blocks(rows=True)
        return self._launch(
            "_positive_sums_kernel",
            "rows cols sums begin end own num_valid totals padded_rows",
            blocks,
            (padded_rows(self.num_rows) // CLASS_ROWS, self.num_totals),
        )

    @_remembered
    def attraction(self, *, of_columns: bool, both_anchor: bool = False) -> Launch:
        """The part of the gradient that comes from positives by class."""
        owners, _ = self._sides(of_columns)
        blocks = self._class_blocks(rows=True)
        return self._launch(
            "_attraction_kernel",
            "rows cols row_pull col_pull sums weighted_sums begin end own num_valid slices",
            {**self._anchors(of_columns, both_anchor), **blocks},
            (padded_rows(owners) // CLASS_ROWS, self.num_totals),
            num_warps=8,  # two sums of rows in float64
        )

    @_remembered
    def finish_loss(self) -> Launch:
        """Losses and statistics from the sums."""
        return self._launch(
            "_finish_loss_kernel",
            "powers totals logits order begin end own num_valid_rows num_valid_cols scale poison "
            "loss stats contributes num_rows padded_rows num_splits num_totals",
            {
                "SHIFTED": self.shifted,
                "OUT": self.summation == "out",
                "DENOMINATOR": self.denominator,
                "ROWS": ROW_PADDING,
            },
            (padded_rows(self.num_rows) // ROW_PADDING,),
        )

    @_remembered
    def weights(self) -> Launch:
        """What each anchor weighs in the backward kernels."""
        return self._launch(
            "_weights_kernel",
            "upstream peak stats order weights num_rows padded_rows upstream_stride headroom",
            {
                "SHIFTED": self.shifted,
                "OUT": self.summation == "out",
                "DENOMINATOR": self.denominator,
                "ROWS": ROW_PADDING,
            },
            (padded_rows(self.num_rows) // ROW_PADDING,),
        )

    # --- the kernels of pairs

    @_remembered
    def forward(self) -> Launch:
        """The sums of powers over all pairs."""
        tile = self.forward_tile
        return self._launch(
            "_forward_kernel",
            "rows cols begin end own num_valid_rows num_valid_cols scale powers padded_rows",
            {
                "SHIFTED": self.shifted,
                "BANDED": not self.by_class,
                **self._pair_constexprs(tile),
                "NARROW": tile.narrow,
            },
            (padded_rows(self.num_rows) // tile.rows, self.forward_splits),
            tile,
        )

    @_remembered
    def one_positive(self) -> Launch:
        """The second look at positives that stand alone against the negatives."""
        tile = self.forward_tile
        return self._launch(
            "_one_positive_kernel",
            "rows cols begin end own num_valid_rows num_valid_cols scale powers logits "
            "padded_rows num_splits",
            {
                "SHIFTED": self.shifted,
                "OUT": self.summation == "out",
                **self._pair_constexprs(tile),
                "COLS": tile.narrow,
            },
            (padded_rows(self.num_rows) // tile.rows,),
            tile,
        )

    @_remembered
    def backward(self, *, of_columns: bool, both_anchor: bool = False) -> Launch:
        """The gradient of the rows, of rows that are columns too, or of the columns."""
        tile = self.backward_tile
        owners, _ = self._sides(of_columns)
        slices = padded_dim(self.dim) // slice_of(self.dim, self.dtype)
        return self._launch(
            "_backward_kernel",
            "rows cols begin end own row_weights col_weights num_valid_rows num_valid_cols scale "
            "slices padded_rows padded_cols",
            {
                "SHIFTED": self.shifted,
                "OUT": self.summation == "out",
                "DENOMINATOR": self.denominator,
                **self._anchors(of_columns, both_anchor),
                **self._pair_constexprs(tile),
                "NARROW": tile.narrow,
                "SLICE": slice_of(self.dim, self.dtype),
            },
            (padded_rows(owners) // tile.rows, self.backward_splits(of_columns), slices),
            tile,
        )

    # --- what they share

    @property
    def _contrasts(self) -> int:
        return self.num_rows if self.num_cols is None else self.num_cols

    def _sides(self, of_columns: bool) -> tuple[int, int]:
        """How many rows own the gradient, and how many are streamed past them."""
        sides = (self.num_rows, self._contrasts)
        return sides[::-1] if of_columns else sides

    def _splits(self, owners: int, streamed: int, tile: Tile, slices: int) -> int:
        blocks = slices * _cdiv(owners, tile.rows)
        return num_splits(blocks, _cdiv(streamed, tile.cols), self.target.num_multiprocessors)

    def _anchors(self, of_columns: bool, both_anchor: bool) -> dict[str, Constexpr]:
        """Which of the two sides of a gradient are anchors, as the kernels' constants."""
        streamed = of_columns or self.square or both_anchor
        return {"ROWS_ANCHOR": not of_columns, "COLS_ANCHOR": streamed}

    @property
    def _row_block(self) -> dict[str, int]:
        """A few thousand features a program, in whole rows."""
        padded = padded_dim(self.dim)
        width = 1 << (padded - 1).bit_length()
        return {
            "PADDED_DIM": padded,
            "BLOCK_ROWS": min(max(2048 // width, 1), ROW_PADDING),
            "BLOCK_DIM": width,
        }

    @property
    def _class_block(self) -> int:
        return min(padded_dim(self.dim), CLASS_DIM)

    def _class_blocks(self, *, rows: bool) -> dict[str, Constexpr]:
        blocks: dict[str, Constexpr] = {
            "PADDED_DIM": padded_dim(self.dim),
            "CHUNK": CHUNK_ROWS,
            "BLOCK_DIM": self._class_block,
        }
        return {**blocks, "BLOCK_ROWS": CLASS_ROWS} if rows else blocks

    def _pair_constexprs(self, tile: Tile) -> dict[str, Constexpr]:
        return {
            "PADDED_DIM": padded_dim(self.dim),
            "ROWS": tile.rows,
            "COLS": tile.cols,
            "CHUNK": tile.chunk,
            # Without effect on 16-bit operands.
            "PRECISION": "tf32" if self.tf32 else "tf32x3",
        }

    def _launch(
        self,
        kernel: str,
        arguments: str,
        constexprs: dict[str, Constexpr],
        grid: tuple[int, ...],
        tile: Tile | None = None,
        num_warps: int = 4,
    ) -> Launch:
        types = {name: self._type_of(name) for name in arguments.split()}
        signature = {
            name + "_ptr" if kind.startswith("*") else name: kind for name, kind in types.items()
        }
        aligned = tuple(
            name
            for name, kind in signature.items()
            if name.startswith("padded") or (kind.startswith("*") and name not in _UNALIGNED)
        )
        warps, stages = (num_warps, 1) if tile is None else (tile.num_warps, tile.num_stages)
        return Launch(kernel, signature, constexprs, aligned, warps, stages, grid)

    def _type_of(self, name: str) -> str:
        if name in ("features", "gradient", "rows", "cols"):
            return "*" + _TYPES[self.dtype]
        for kind, names in _ARGUMENT_TYPES.items():
            if name in names.split():
                return kind
        return "fp32" if name in ("fold", "headroom") else "i32"


# Calls of one shape share their plan.
plan_of = cast(type[Plan], functools.lru_cache(maxsize=256)(Plan))


def shipped_launches(dtype: str, dim: int, capability: int) -> list[tuple[str, Launch]]:
    """Every launch that the backend may choose for features of this dtype, width and architecture.

    Args:
        dtype: "float32", "float16" or "bfloat16"; "tf32" is float32 in one product of TF32.
        dim: D.
        capability: 80, 86, 90 or 100.

    Returns:
        (label, launch) pairs, the default loss first. Sizes stand in grids alone, so that one
        number of rows stands for all.
    """
    launches: dict[str, Launch] = {}
    for summation in ("out", "in"):
        for denominator in ("all", "one_positive", "only_negatives"):
            for shifted in (True, False):
                for num_cols in (None, 16384):
                    plan = Plan(
                        dtype="float32" if dtype == "tf32" else dtype,
                        dim=dim,
                        num_rows=8192,
                        num_cols=num_cols,
                        target=Target(capability, 100),
                        shifted=shifted,
                        summation=summation,
                        denominator=denominator,
                        normalize=True,
                        tf32=dtype == "tf32",
                    )
                    for label, launch in _launches_of(plan):
                        launches.setdefault(label, launch)
    return _without_repetition(launches)


def _launches_of(plan: Plan) -> list[tuple[str, Launch]]:
    """The launches of one plan under labels that tell them from those of another plan."""
    loss = f"{plan.summation}/{plan.denominator}"
    sums = "" if plan.shifted else ", running maximum"
    shape = "" if plan.square else ", memory"
    call = f"{loss}{sums}{shape}"
    found = [(f"forward {call}", plan.forward())]
    if plan.denominator == "one_positive":
        found.append((f"one_positive {call}", plan.one_positive()))
    found.append((f"backward {call}", plan.backward(of_columns=False)))
    if not plan.square:
        found.append((f"backward of columns {call}", plan.backward(of_columns=True)))
    found += [
        (f"finish_loss {call}", plan.finish_loss()),
        (f"weights {call}", plan.weights()),
        ("prepare", plan.prepare(plan.num_rows)),
        ("prepare as given", dataclasses.replace(plan, normalize=False).prepare(plan.num_rows)),
        ("finish_gradient", plan.finish_gradient(plan.num_rows)),
        (
            "finish_gradient as given",
            dataclasses.replace(plan, normalize=False).finish_gradient(plan.num_rows),
        ),
    ]
    if plan.sums_positives:
        found.append((f"chunk_sums {call}", plan.chunk_sums(plan.num_rows, weighted=False)))
        found.append((f"positive_sums {call}", plan.positive_sums()))
    if plan.by_class:
        found.append((f"chunk_sums weighted {call}", plan.chunk_sums(8192, weighted=True)))
        found.append((f"attraction {call}", plan.attraction(of_columns=False)))
        if not plan.square:
            found.append((f"attraction of columns {call}", plan.attraction(of_columns=True)))
    return found


def _without_repetition(launches: dict[str, Launch]) -> list[tuple[str, Launch]]:
    """One launch for each that compiles to a kernel of its own."""
    seen: dict[object, tuple[str, Launch]] = {}
    for label, launch in launches.items():
        key = (launch.kernel, tuple(launch.constexprs.items()))
        seen.setdefault(key, (label, launch))
    return list(seen.values())
