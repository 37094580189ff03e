"""How the Triton kernels are launched: tiles, warps, stages, and who does which share of the pairs.

Pure functions of metadata. Nothing here needs triton or a device, and the backend compiles and
launches through these very objects, so what a test or a compiler is given is what ships.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, cast

# Rows of a side, zeros behind the last, so that no tile of any pair kernel needs a mask to load.
ROW_PADDING = 128
MAX_DIM = 2048
# Rows times columns: tiles are counted in 32 bits.
MAX_PAIRS = 2**40
# Tiles of pairs below which a program costs more than it brings.
MIN_SHARE = 4
# Pairs of anchor and contrast, from which on labels are sorted and not compared each with each.
SORTED_PAIRS = 2**26
# The offset of a side of which no row is among the other: below every row's number.
NOT_AMONG = -(2**30)
# Down to the first, sums of 2^x over unit rows stay within half of float32's exponents; up to the
# second, rows that carry the temperature are not so small that float16 loses their bits.
FITTING_TEMPERATURES = (0.023, 4.0)

Constexpr = int | bool | str
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch of a kernel: everything but the values of its runtime arguments.

    Attributes:
        kernel: name of a ``@triton.jit`` function in ``supcon_kernels.kernels``.
        signature: runtime argument -> triton type, such as "*bf16" or "i32", in order.
        constexprs: compile-time argument -> value.
        divisible_by_16: runtime arguments known to be multiples of 16.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        grid: programs along each axis.
        loaded: what has been compiled of it, by index of the device.
    """

    kernel: str
    signature: dict[str, str]
    constexprs: dict[str, Constexpr]
    divisible_by_16: tuple[str, ...]
    num_warps: int
    num_stages: int
    grid: tuple[int, int, int]
    loaded: dict[int, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is asked for."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    @functools.cached_property
    def code(self) -> Code:
        """All that decides what is compiled."""
        launch = dataclasses.replace(self, grid=(1, 1, 1), loaded={})
        pairs = (*launch.signature.items(), *launch.constexprs.items(), *launch.options.items())
        return Code((launch.kernel, *launch.divisible_by_16, *pairs), launch)


@dataclasses.dataclass(frozen=True)
class Code:
    """A launch without its grid, equal to others that compile to the same.

    Attributes:
        key: what it is compared by.
        launch: the launch.
    """

    key: tuple[object, ...]
    launch: Launch = dataclasses.field(compare=False)


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
    """Features of a padded row: a power of two up to 256, then whole chunks."""
    if dim <= 256:
        return max(16, 1 << (dim - 1).bit_length()) if dim > 0 else 16
    return _cdiv(dim, 128) * 128


def padded_rows(num_rows: int) -> int:
    """Rows of a side with the zeros behind them; never none, so that it has an address."""
    return max(_cdiv(num_rows, ROW_PADDING), 1) * ROW_PADDING


def powers_fit(temperature: float) -> bool:
    """Whether sums of powers of unit rows need no maximum; as the kernels decide it, in float32."""
    low, high = (ctypes.c_float(t).value for t in FITTING_TEMPERATURES)
    return low <= ctypes.c_float(temperature).value <= high


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclasses.dataclass(frozen=True)
class Shares:
    """All pairs, as tiles in the order of row blocks, cut into equal runs, one for each program.

    A run goes on from one block of rows to the next, so that every program has as much to do as
    any other. What several programs do of one block are its pieces, which are added in order.

    Attributes:
        num_blocks: of rows.
        num_tiles: of columns, in each block.
        share: tiles of a program.
    """

    num_blocks: int
    num_tiles: int
    share: int

    @staticmethod
    def of(num_rows: int, num_cols: int, tile: Tile, num_slots: int) -> Shares:
        """As many programs as run at a time, or fewer where there are few tiles.

        Args:
            num_rows, num_cols: padded.
            tile: of the kernel.
            num_slots: programs that run at a time.
        """
        num_blocks, num_tiles = num_rows // tile.rows, num_cols // tile.cols
        share = max(_cdiv(num_blocks * num_tiles, num_slots), MIN_SHARE)
        return Shares(num_blocks, num_tiles, share)

    def in_tiles(self, times: int) -> Shares:
        """The same shares, in so many times as many tiles."""
        return Shares(self.num_blocks, self.num_tiles * times, self.share * times)

    @property
    def num_programs(self) -> int:
        """One for each share."""
        return _cdiv(self.num_blocks * self.num_tiles, self.share)

    @property
    def num_pieces(self) -> int:
        """Of all blocks."""
        inner = range(self.share, self.num_blocks * self.num_tiles, self.share)
        return self.num_blocks + sum(1 for cut in inner if cut % self.num_tiles)

    def slowdown(self, num_slots: int, piece_tiles: float) -> float:
        """Modelled time over that of all slots at work all the time and nothing written.

        Args:
            num_slots: programs that run at a time.
            piece_tiles: what writing a piece takes, in tiles; it goes on beside the products.
        """
        ideal = self.num_blocks * self.num_tiles / num_slots
        products = _cdiv(self.num_programs, num_slots) * self.share
        return max(products, self.num_pieces / num_slots * piece_tiles) / ideal

    @property
    def max_pieces(self) -> int:
        """Of any block."""
        if self.share % self.num_tiles == 0:
            return 1
        aligned = self.num_tiles % self.share == 0
        return min(_cdiv(self.num_tiles, self.share) + (not aligned), self.num_programs)


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
        lean: only for the default loss, whose powers fit.
    """

    products: str
    max_dim: int
    capabilities: tuple[int, ...]
    tile: Tile
    why: str
    lean: bool = False


_INTERPRETED = Tile(32, 32, 64, 4, 1)  # small enough for several tiles of 100 rows
_ALL, _MMA = (80, 86, 90, 100), (80, 86)
# How numbers are multiplied: 16-bit ones as they are, float32 in three products of TF32, or in one.
_SHORT, _TF32X3, _TF32 = "16 bits", "tf32x3", "tf32"

_FORWARD = (
    _Row(_SHORT, 128, (90,), Tile(64, 128, 128, 4, 2, 2), "fewest instructions of two programs"),
    _Row(_SHORT, 128, _ALL, Tile(64, 64, 128, 4, 2, 2), "two programs, of two exponentials too"),
    _Row(_SHORT, MAX_DIM, _ALL, Tile(64, 64, 64, 4, 3, 2), "as above"),
    _Row(_TF32X3, MAX_DIM, _ALL, Tile(64, 64, 16, 4, 2), "TF32's parts are in registers"),
    _Row(_TF32, MAX_DIM, _ALL, Tile(64, 64, 32, 4, 2, 2), "two programs"),
)
_BACKWARD = (
    _Row(_SHORT, 128, (80, 90), Tile(64, 128, 128, 4, 2, 2), "two programs", lean=True),
    _Row(_SHORT, 128, (86,), Tile(64, 64, 128, 4, 2, 2), "two programs in 99 KiB", lean=True),
    _Row(_SHORT, 128, _ALL, Tile(64, 32, 128, 4, 3, 2), "two exponentials: 64 columns spill"),
    _Row(_SHORT, 256, (90,), Tile(128, 64, 256, 8, 2), "gradient: half a thread", lean=True),
    _Row(_SHORT, 256, _MMA, Tile(64, 32, 256, 8, 2), "gradient: half a thread"),
    _Row(_SHORT, MAX_DIM, (90,), Tile(128, 32, 64, 8, 3), "with 256 features 64 columns spill"),
    _Row(_SHORT, MAX_DIM, _MMA, Tile(64, 32, 64, 8, 3), "with 256 features 64 columns spill"),
    _Row(_SHORT, MAX_DIM, (100,), Tile(64, 32, 64, 4, 2, 2), "gradient: half a thread"),
    _Row(_TF32X3, MAX_DIM, (86,), Tile(64, 16, 16, 4, 2, 2), "as below; one stage spills"),
    _Row(_TF32X3, MAX_DIM, _ALL, Tile(64, 16, 16, 4, 1, 2), "TF32's parts are in registers"),
    _Row(_TF32, MAX_DIM, (100,), Tile(64, 32, 32, 4, 3, 2), "as below; two stages spill"),
    _Row(_TF32, MAX_DIM, _ALL, Tile(64, 32, 32, 4, 2, 2), "gradient: half a thread"),
)


def slice_of(dim: int, dtype: str = "bfloat16", capability: int = 90) -> int:
    """Features of the gradient that one program of the backward owns."""
    padded, widest = padded_dim(dim), 1024 // (2 * _BYTES[dtype])
    if capability == 100:  # what leaves tensor memory takes all registers
        widest = 128
    return padded if padded <= widest else widest if padded % widest == 0 else 128


# --- one call


_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
# Runtime arguments by type; those of the features' dtype are not listed, plain integers neither.
_ARGUMENT_TYPES = {
    "*fp32": "valid col_valid sums first_sums second_sums loss count stats upstream peak weights "
    "row_weights col_weights factor slices temperature temperature_gradient",
    "*fp64": "dots",
    "*i64": "labels anchor_labels contrast_labels",
    "*i32": "ids row_ids col_ids sorted_begin sorted_end num_positives",
    "i64": "sample_stride view_stride gradient_sample_stride gradient_view_stride ignore_index",
    "fp32": "host_temperature headroom part",
}
# Tensors of the caller, which may begin anywhere.
_UNALIGNED = "features gradient upstream peak temperature labels anchor_labels contrast_labels"

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
        fits: whether sums of powers need no maximum; None: the temperature is on the device.
        summation, denominator, normalize: as in ``Problem``.
        tf32: whether one product of TF32 stands for one of float32.
    """

    dtype: str
    dim: int
    num_rows: int
    num_cols: int | None
    target: Target
    fits: bool | None
    summation: str
    denominator: str
    normalize: bool
    tf32: bool = False

    @property
    def products(self) -> str:
        """How numbers are multiplied."""
        if self.dtype != "float32":
            return _SHORT
        return _TF32 if self.tf32 else _TF32X3

    @property
    def square(self) -> bool:
        """Whether the rows are contrasted with each other."""
        return self.num_cols is None

    @property
    def running(self) -> tuple[bool, ...]:
        """Which pair kernels are launched: without a maximum, with one, or both, of which one returns at once."""
        if not self.normalize:
            return (True,)
        return (False, True) if self.fits is None else (not self.fits,)

    @property
    def looks_twice(self) -> bool:
        """Whether the forward needs the sum of the negatives before it can look at positives."""
        return self.denominator == "one_positive"

    def forward_tile(self, running: bool) -> Tile:
        """Of the kernel that only multiplies rows with columns."""
        return self._find(_FORWARD, running)

    def backward_tile(self, running: bool) -> Tile:
        """Of the kernel that also multiplies with what it made of the products."""
        return self._find(_BACKWARD, running)

    def forward_shares(self, running: bool) -> Shares:
        """The pairs of a forward kernel; its pieces are the same if there is another."""
        return self._shares(_FORWARD, running, self.num_rows, self._contrasts, 1)

    def backward_shares(self, running: bool, *, of_columns: bool = False) -> Shares:
        """The pairs of a backward kernel of the rows, or of the columns."""
        owners, streamed = (self.num_rows, self._contrasts)[:: -1 if of_columns else 1]
        return self._shares(_BACKWARD, running, owners, streamed, self._num_slices)

    # --- rows

    @_remembered
    def prepare(self, num_rows: int, *, anchors: bool, sort: bool) -> Launch:
        """Normalises, scales, rounds and pads a side, and makes its labels small numbers."""
        return self._launch(
            "_prepare_kernel",
            "features labels anchor_labels contrast_labels sorted_begin sorted_end temperature "
            "rows ids valid num_positives num_rows num_samples num_anchors num_contrasts "
            "num_contrast_views own_offset dim sample_stride view_stride ignore_index "
            "host_temperature",
            {
                **self._temperature,
                "TF32": self.tf32,
                "SQUARE": self.square,
                "ANCHORS": anchors,
                "SORTED": sort,
                **self._row_block,
            },
            padded_rows(num_rows) // self._row_block["BLOCK_ROWS"],
        )

    @_remembered
    def gradient(self, num_rows: int, *, dots: bool) -> Launch:
        """Adds up pieces and goes back through normalisation."""
        return self._launch(
            "_gradient_kernel",
            "slices features rows ids factor gradient dots num_rows num_samples dim "
            "sample_stride view_stride gradient_sample_stride gradient_view_stride padded_rows "
            "num_tiles share",
            {
                "NORMALIZE": self.normalize,
                "DOTS": dots,
                "ROWS": self.backward_tile(self.running[0]).rows,
                **self._row_block,
            },
            padded_rows(num_rows) // self._row_block["BLOCK_ROWS"],
        )

    @_remembered
    def temperature_gradient(self) -> Launch:
        """Adds up what the rows give to it."""
        return self._launch(
            "_temperature_kernel",
            "dots temperature temperature_gradient padded_rows part host_temperature",
            {**self._temperature, "BLOCK_ROWS": ROW_PADDING},
            1,
        )

    # --- statistics

    @_remembered
    def loss(self, reduction: str) -> Launch:
        """Losses and statistics from the sums."""
        return self._launch(
            "_loss_kernel",
            "sums second_sums valid col_valid num_positives loss count stats num_rows padded_rows "
            "padded_cols num_tiles share max_pieces",
            {
                **self._variant,
                "REDUCTION": reduction,
                "ROWS": self.forward_tile(self.running[0]).rows,
                "BLOCK_ROWS": 1024,
            },
            1,
            num_warps=8,
        )

    @_remembered
    def weights(self, num_rows: int) -> Launch:
        """What each anchor weighs in the backward kernel."""
        return self._launch(
            "_weights_kernel",
            "upstream peak count stats temperature weights factor num_rows padded_rows "
            "upstream_stride headroom host_temperature",
            {**self._temperature, **self._variant, "BLOCK_ROWS": ROW_PADDING},
            padded_rows(num_rows) // ROW_PADDING,
        )

    # --- pairs

    @_remembered
    def forward(self, running: bool, *, second: bool = False) -> Launch:
        """The sums over all pairs; the second look at positives that stand alone against the negatives."""
        tile = self.forward_tile(running)
        return self._launch(
            "_forward_kernel",
            "rows cols row_ids col_ids col_valid first_sums temperature sums padded_rows "
            "num_blocks num_tiles share max_pieces own_offset host_temperature",
            {
                **self._pairs(running),
                "SECOND": second,
                **self._tile(tile),
            },
            self.forward_shares(running).num_programs,
            tile=tile,
        )

    @_remembered
    def backward(
        self, running: bool, *, of_columns: bool = False, both_anchor: bool = False
    ) -> Launch:
        """The gradient of the rows, of rows that are columns too, or of the columns."""
        tile = self.backward_tile(running)
        return self._launch(
            "_backward_kernel",
            "rows cols row_ids col_ids row_weights col_weights temperature slices padded_rows "
            "padded_cols num_blocks num_tiles share own_offset host_temperature",
            {
                **self._pairs(running),
                "ROWS_ANCHOR": not of_columns,
                "COLS_ANCHOR": of_columns or self.square or both_anchor,
                **self._tile(tile),
                "SLICE": self._slice,
            },
            self.backward_shares(running, of_columns=of_columns).num_programs,
            self._num_slices,
            tile=tile,
        )

    # --- what they share

    @property
    def _contrasts(self) -> int:
        return self.num_rows if self.num_cols is None else self.num_cols

    @property
    def _num_slices(self) -> int:
        return padded_dim(self.dim) // self._slice

    @property
    def _slice(self) -> int:
        return slice_of(self.dim, self.dtype, self.target.capability)

    def _find(self, table: tuple[_Row, ...], running: bool) -> Tile:
        padded, capability = padded_dim(self.dim), self.target.capability
        lean = not running and self.summation == "out" and self.denominator == "all"
        tile = _INTERPRETED
        if capability:
            tile = next(
                row.tile
                for row in table
                if row.products == self.products
                and padded <= row.max_dim
                and capability in row.capabilities
                and (lean or not row.lean)
            )
        return dataclasses.replace(tile, chunk=min(tile.chunk, padded))

    def _shares(
        self, table: tuple[_Row, ...], running: bool, owners: int, streamed: int, num_slices: int
    ) -> Shares:
        first = self._find(table, self.running[0])
        num_slots = max(self.target.num_multiprocessors * first.residents // num_slices, 1)
        shares = Shares.of(padded_rows(owners), padded_rows(streamed), first, num_slots)
        return shares.in_tiles(first.cols // self._find(table, running).cols)

    @property
    def _temperature(self) -> dict[str, Constexpr]:
        return {"ON_DEVICE": self.fits is None, "NORMALIZE": self.normalize}

    @property
    def _variant(self) -> dict[str, Constexpr]:
        return {"OUT": self.summation == "out", "DENOMINATOR": self.denominator}

    def _pairs(self, running: bool) -> dict[str, Constexpr]:
        return {
            "ON_DEVICE": self.fits is None,
            "EITHER": len(self.running) == 2,
            "RUNNING": running,
            **self._variant,
        }

    def _tile(self, tile: Tile) -> dict[str, Constexpr]:
        return {
            "PADDED_DIM": padded_dim(self.dim),
            "ROWS": tile.rows,
            "COLS": tile.cols,
            "CHUNK": tile.chunk,
            # Without effect on 16-bit operands.
            "PRECISION": "tf32" if self.tf32 else "tf32x3",
        }

    @property
    def _row_block(self) -> dict[str, int]:
        """About a thousand features a program, in whole rows of one block of any pair kernel."""
        padded = padded_dim(self.dim)
        width = 1 << (padded - 1).bit_length()
        return {
            "PADDED_DIM": padded,
            "BLOCK_ROWS": min(max(1024 // width, 1), 32),
            "BLOCK_DIM": width,
        }

    def _launch(
        self,
        kernel: str,
        arguments: str,
        constexprs: dict[str, Constexpr],
        *grid: int,
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
            if name.startswith("padded")
            or (kind.startswith("*") and name.removesuffix("_ptr") not in _UNALIGNED.split())
        )
        whole_grid = (grid[0], grid[1] if grid[1:] else 1, 1)
        if tile is None:
            return Launch(kernel, signature, constexprs, aligned, num_warps, 1, whole_grid)
        depth = (tile.num_warps, tile.num_stages)
        return Launch(kernel, signature, constexprs, aligned, *depth, whole_grid)

    def _type_of(self, name: str) -> str:
        if name in ("features", "gradient", "rows", "cols"):
            return "*" + _TYPES[self.dtype]
        kinds = (kind for kind, names in _ARGUMENT_TYPES.items() if name in names.split())
        return next(kinds, "i32")


# Calls of one shape share their plan.
plan_of = cast(type[Plan], functools.lru_cache(maxsize=256)(Plan))


def shipped_launches(dtype: str, dim: int, capability: int) -> list[tuple[str, Launch]]:
    """Every launch that the backend may choose for features of this dtype, width and architecture.

    Args:
        dtype: "float32", "float16" or "bfloat16"; "tf32" is float32 in one product of TF32.
        dim: D.
        capability: 80, 86, 90 or 100.

    Returns:
        (label, launch) pairs, the default loss first, one for each that compiles to a kernel of
        its own. Sizes stand in grids alone, so that one number of rows stands for all.
    """
    launches: dict[object, tuple[str, Launch]] = {}
    for summation in ("out", "in"):
        for denominator in ("all", "one_positive", "only_negatives"):
            for normalize, fits in (
                (True, True),
                (True, False),
                (True, None),
                (False, False),
                (False, None),
            ):
                for num_cols in (None, 16384):
                    plan = Plan(
                        dtype="float32" if dtype == "tf32" else dtype,
                        dim=dim,
                        num_rows=8192,
                        num_cols=num_cols,
                        target=Target(capability, 100),
                        fits=fits,
                        summation=summation,
                        denominator=denominator,
                        normalize=normalize,
                        tf32=dtype == "tf32",
                    )
                    for label, launch in _launches_of(plan):
                        launches.setdefault(launch.code, (label, launch))
    return list(launches.values())


def _launches_of(plan: Plan) -> list[tuple[str, Launch]]:
    """The launches of one plan under labels that tell them from those of another plan."""
    loss = f"{plan.summation}/{plan.denominator}"
    shape = "" if plan.square else ", memory"
    given = "" if plan.normalize else ", as given"
    tau = ", τ on the device" if plan.fits is None else ""
    n, found = plan.num_rows, []
    for running in plan.running:
        call = f"{loss}{', running maximum' if running else ''}{tau}{given}{shape}"
        found.append((f"forward {call}", plan.forward(running)))
        if plan.looks_twice:
            found.append((f"second forward {call}", plan.forward(running, second=True)))
        found.append((f"backward {call}", plan.backward(running)))
        if not plan.square:
            found += [
                (f"backward of both {call}", plan.backward(running, both_anchor=True)),
                (f"backward of columns {call}", plan.backward(running, of_columns=True)),
            ]
    found.append((f"weights {loss}{tau}{given}", plan.weights(n)))
    for reduction in ("mean", "positive_mean", "sum", "none"):
        found.append((f"loss {loss}, {reduction}", plan.loss(reduction)))
    for sort in (False, True):
        for anchors in (True, False):
            side = f"{shape}{'' if anchors else ', not counted'}{', sorted' if sort else ''}"
            launch = plan.prepare(n, anchors=anchors, sort=sort)
            found.append((f"prepare{tau}{given}{side}", launch))
    for dots in (False, True):
        label = f"gradient{given}{', dots' if dots else ''}"
        found.append((label, plan.gradient(n, dots=dots)))
    found.append((f"temperature{tau}{given}", plan.temperature_gradient()))
    return found
