"""The launches of one call of the Triton kernels, forward and backward.

Pure functions of metadata. Nothing here needs triton or a device, and the backend compiles and
launches through these very objects, so what a test or a compiler is given is what ships.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

from supcon_kernels.triton_shares import Shares
from supcon_kernels.triton_tiles import (
    BACKWARD,
    DERIVATIVES,
    FORWARD,
    FORWARD_BOTH,
    FORWARD_BOTH_TWICE,
    MANY_ROWS,
    ROW_PADDING,
    SHORT,
    TF32,
    TF32X3,
    Row,
    Target,
    Tile,
    cdiv,
    is_wide,
    padded_dim,
    padded_rows,
    tile_of,
)

# Rows times columns: tiles are counted in 32 bits.
MAX_PAIRS = 2**40
# Pairs of anchor and contrast, from which on labels are sorted and not compared each with each, where a
# program prepares up to two rows; of more rows each two allow so many pairs.
SORTED_PAIRS = 2**26
# Of a multiprocessor, which gives them to threads in eights.
REGISTERS = 65536
# Anchors of a program of the loss kernel.
LOSS_ROWS = 1024
# Of H at a time, where rows are wide, unless the caller sets another limit.
WORKSPACE_BYTES = 2**28
# Rows of a block of H, from which on its columns may be cut: a product of fewer is slow.
WIDE_BLOCK = 1024
# Of a program that prepares rows. From MANY_ROWS of a side on it has more of them.
PREPARE_WARPS = 8
# The offset of a side of which no row is among the other: below every row's number.
NOT_AMONG = -(2**30)
# Down to the first, sums of 2^x over unit rows stay within half of float32's exponents; up to the
# second, rows that carry the temperature are not so small that float16 loses their bits.
FITTING_TEMPERATURES = (0.023, 4.0)
# Below every exponent, and still a number: differences with it are not NaN.
LOWEST = -3e38

Constexpr = int | bool | str | None


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
        max_registers: of a thread; None: the compiler decides.
        loaded: what starts it and the order of its arguments, by index of the device.
    """

    kernel: str
    signature: dict[str, str]
    constexprs: dict[str, Constexpr]
    divisible_by_16: tuple[str, ...]
    num_warps: int
    num_stages: int
    grid: tuple[int, int, int]
    max_registers: int | None = None
    loaded: dict[int, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is asked for."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}

    @functools.cached_property
    def code(self) -> tuple[object, ...]:
        """All that decides what is compiled: equal where the grid alone differs."""
        pairs = (*self.signature.items(), *self.constexprs.items(), *self.options.items())
        return (self.kernel, *self.divisible_by_16, *pairs)


def powers_fit(temperature: float) -> bool:
    """Whether sums of powers of unit rows need no maximum; as the kernels decide it, in float32."""
    low, high = (ctypes.c_float(t).value for t in FITTING_TEMPERATURES)
    return low <= ctypes.c_float(temperature).value <= high


_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
# Runtime arguments by type; those of the features' dtype are not listed, plain integers neither.
_ARGUMENT_TYPES = {
    "*fp32": "valid row_valid col_valid sums col_sums first_sums first_col_sums second_sums loss count stats "
    "upstream peak weights row_weights col_weights factor slices temperature temperature_gradient",
    "*fp64": "dots partials",
    "*i64": "labels anchor_labels contrast_labels",
    "*i32": "sorted_begin sorted_end num_positives",
    "i64": "sample_stride view_stride gradient_sample_stride gradient_view_stride ignore_index",
    "fp32": "host_temperature headroom part",
}
# Tensors of the caller, which may begin anywhere.
_UNALIGNED = "features gradient upstream peak temperature labels anchor_labels contrast_labels"

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _remembered(planned: Callable[_P, _T]) -> Callable[_P, _T]:
    """A training step asks for the same launches again and again: it shall not wait for them."""
    return cast(Callable[_P, _T], functools.lru_cache(maxsize=1024)(planned))


@dataclasses.dataclass(frozen=True, eq=False)  # a step looks up launches by the plan: by identity
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
        symmetric: whether the columns are anchors, too.
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
    symmetric: bool = False

    @property
    def products(self) -> str:
        """How numbers are multiplied."""
        if self.dtype != "float32":
            return SHORT
        return TF32 if self.tf32 else TF32X3

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

    @property
    def is_wide(self) -> bool:
        """Whether the backward writes H in blocks, and multiplies these by torch's own product."""
        return is_wide(self.dim, self.dtype, self.target.capability)

    @functools.cached_property
    def both(self) -> bool:
        """Whether one forward has the sums of the rows and of the columns.

        Four numbers for each look, slot and column are no more than the backward takes: float32 products of
        either side, beside a workspace.
        """
        if not self.symmetric or not self.is_wide:
            return False
        sides = padded_rows(self.num_rows), padded_rows(self._contrasts)
        shares = self._shares(self._forward_both, self.running[0], self.num_rows, self._contrasts)
        of_backward = 4 * sum(sides) * padded_dim(self.dim) + WORKSPACE_BYTES
        num_looks = 2 if self.looks_twice else 1
        return 16 * num_looks * shares.num_col_slots * sides[1] <= of_backward

    def sorts_labels(self, num_pairs: int) -> bool:
        """Whether sorting labels takes less than comparing so many pairs."""
        rows: int = self._prepare_block(self.num_rows)["BLOCK_ROWS"]
        return num_pairs > SORTED_PAIRS * max(rows // 2, 1)

    def blocks(self, workspace: int) -> tuple[int, int]:
        """Padded rows and columns of a block of H that takes at most so many bytes: whole rows if it can."""
        rows, cols = padded_rows(self.num_rows), padded_rows(self._contrasts)
        pairs = max(workspace // (4 if self.dtype == "float32" else 2), ROW_PADDING**2)
        few = min(rows, WIDE_BLOCK)
        cols = min(cols, max(pairs // few // ROW_PADDING, 1) * ROW_PADDING)
        return min(rows, pairs // cols // ROW_PADDING * ROW_PADDING), cols

    def forward_tile(self, running: bool) -> Tile:
        """Of the kernel that only multiplies rows with columns."""
        return self._find(self._forward, running)

    def backward_tile(self, running: bool) -> Tile:
        """Of the kernel that also multiplies with what it made of the products."""
        return self._find(BACKWARD, running)

    @_remembered
    def forward_shares(self, running: bool) -> Shares:
        """The pairs of a forward kernel; its pieces are the same if there is another."""
        return self._shares(self._forward, running, self.num_rows, self._contrasts)

    @_remembered
    def backward_shares(self, running: bool, *, of_columns: bool = False) -> Shares:
        """The pairs of a backward kernel of the rows, or of the columns."""
        owners, streamed = (self.num_rows, self._contrasts)[:: -1 if of_columns else 1]
        return self._shares(BACKWARD, running, owners, streamed)

    # --- rows

    @_remembered
    def prepare(self, num_rows: int) -> Launch:
        """Normalises, scales, rounds and pads a side, and makes its labels small numbers."""
        block = self._prepare_block(num_rows)
        return self._launch(
            "_prepare_kernel",
            "features labels anchor_labels contrast_labels sorted_begin sorted_end temperature "
            "rows valid num_positives padded_rows num_rows num_samples num_anchors num_contrasts "
            "num_contrast_views own_offset dim sample_stride view_stride ignore_index "
            "padded_dim host_temperature on_device has_anchors is_square is_sorted",
            {"NORMALIZE": self.normalize, "TF32": self.tf32, **block},
            padded_rows(num_rows) // block["BLOCK_ROWS"],
            num_warps=max(self._row_warps, PREPARE_WARPS),
        )

    @_remembered
    def gradient(self, num_rows: int, *, dots: bool, unrounded: bool = False) -> Launch:
        """Adds up pieces and goes back through normalisation; ``unrounded``: in float32."""
        launch = self._launch(
            "_gradient_kernel",
            "slices features rows factor gradient dots num_rows num_samples dim "
            "sample_stride view_stride gradient_sample_stride gradient_view_stride padded_rows "
            "num_tiles group share padded_dim",
            {
                "NORMALIZE": self.normalize,
                "DOTS": dots,
                "ROWS": ROW_PADDING if self.is_wide else self.backward_tile(self.running[0]).rows,
                **self._row_block,
            },
            padded_rows(num_rows) // self._row_block["BLOCK_ROWS"],
            num_warps=self._row_warps,
        )
        if not unrounded:
            return launch
        return dataclasses.replace(launch, signature={**launch.signature, "gradient_ptr": "*fp32"})

    @_remembered
    def temperature_gradient(self) -> Launch:
        """Adds up what the rows give to it."""
        return self._launch(
            "_temperature_kernel",
            "dots temperature temperature_gradient padded_rows part host_temperature on_device",
            {"NORMALIZE": self.normalize, "BLOCK_ROWS": ROW_PADDING},
            1,
        )

    # --- statistics

    @_remembered
    def loss(self, reduction: str, num_rows: int) -> Launch:
        """Losses and statistics of so many anchors from the sums."""
        return self._launch(
            "_loss_kernel",
            "sums second_sums valid col_valid num_positives partials loss count stats num_rows "
            "padded_rows padded_cols num_tiles group share max_pieces",
            {
                **self._variant,
                "REDUCTION": reduction,
                "ROWS": self.forward_tile(self.running[0]).rows,
                "BLOCK_ROWS": LOSS_ROWS,
            },
            cdiv(padded_rows(num_rows), LOSS_ROWS),
            num_warps=16,  # with fewer, Triton 3.6 spills
        )

    @_remembered
    def weights(self, num_rows: int) -> Launch:
        """What each anchor weighs in the backward kernel."""
        return self._launch(
            "_weights_kernel",
            "upstream peak count stats temperature weights factor num_rows padded_rows "
            "upstream_stride headroom host_temperature on_device",
            {"NORMALIZE": self.normalize, **self._variant, "BLOCK_ROWS": ROW_PADDING},
            padded_rows(num_rows) // ROW_PADDING,
        )

    # --- pairs

    @_remembered
    def forward(self, running: bool, *, first_look: bool = False) -> Launch:
        """The sums over all pairs; ``first_look``: of the negatives alone, before "one_positive"."""
        tile = self.forward_tile(running)
        variant: dict[str, Constexpr] = {}
        if first_look:
            variant = {"OUT": True, "DENOMINATOR": "only_negatives"}
        of_cols = ["row_valid", "col_sums"] if self.both else []
        if self.both and self.looks_twice and not first_look:
            of_cols.append("first_col_sums")
        absent = [x for x in ("row_valid", "col_sums", "first_col_sums") if x not in of_cols]
        return self._launch(
            "_forward_kernel",
            "rows cols col_valid first_sums temperature sums padded_rows padded_cols "
            "num_blocks num_tiles group share max_pieces own_offset padded_dim "
            "host_temperature on_device either " + " ".join(of_cols),
            {
                **self._pairs(running, tile),
                **variant,
                **{name + "_ptr": None for name in absent},
                "BOTH": self.both,
                "ONE_CHUNK": tile.chunk == padded_dim(self.dim),
            },
            self.forward_shares(running).num_programs,
            tile=tile,
        )

    @_remembered
    def backward(
        self, running: bool, *, of_columns: bool = False, both_anchor: bool = False
    ) -> Launch:
        """The gradient of the rows or of the columns; ``both_anchor``: each side has anchors."""
        tile = self.backward_tile(running)
        return self._launch(
            "_backward_kernel",
            "rows cols row_weights col_weights temperature slices padded_rows "
            "padded_cols num_blocks num_tiles group share own_offset "
            "host_temperature on_device either",
            {
                **self._pairs(running, tile),
                "PADDED_DIM": padded_dim(self.dim),
                "ROWS_ANCHOR": not of_columns or both_anchor,
                "COLS_ANCHOR": of_columns or self.square or both_anchor,
            },
            self.backward_shares(running, of_columns=of_columns).num_programs,
            tile=tile,
        )

    @_remembered
    def derivatives(
        self, running: bool, rows: int, cols: int, *, both_anchor: bool = False
    ) -> Launch:
        """A block of H of so many padded rows and columns, where rows are wide."""
        tile = self._find(DERIVATIVES, running)
        return self._launch(
            "_derivatives_kernel",
            "rows cols row_weights col_weights temperature derivatives padded_rows padded_cols "
            "first_row first_col padded_width own_offset padded_dim "
            "host_temperature on_device either",
            {**self._pairs(running, tile), "COLS_ANCHOR": self.square or both_anchor},
            cols // tile.cols * (rows // tile.rows),
            tile=tile,
        )

    # --- what they share

    @property
    def _forward(self) -> tuple[Row, ...]:
        return self._forward_both if self.both else FORWARD

    @property
    def _forward_both(self) -> tuple[Row, ...]:
        return FORWARD_BOTH_TWICE if self.looks_twice else FORWARD_BOTH

    @property
    def _contrasts(self) -> int:
        return self.num_rows if self.num_cols is None else self.num_cols

    def _find(self, table: tuple[Row, ...], running: bool) -> Tile:
        lean = not running and self.summation == "out" and self.denominator == "all"
        padded = padded_dim(self.dim)
        capability, num_rows = self.target.capability, self.num_rows
        return tile_of(table, self.products, padded, capability, lean, num_rows)

    def _shares(self, table: tuple[Row, ...], running: bool, owners: int, streamed: int) -> Shares:
        first = self._find(table, self.running[0])
        num_slots = self.target.num_multiprocessors * first.residents
        shares = Shares.of(padded_rows(owners), padded_rows(streamed), first, num_slots)
        return shares.in_tiles(first.cols // self._find(table, running).cols)

    @property
    def _variant(self) -> dict[str, Constexpr]:
        return {"OUT": self.summation == "out", "DENOMINATOR": self.denominator}

    def _pairs(self, running: bool, tile: Tile) -> dict[str, Constexpr]:
        return {
            "RUNNING": running,
            **self._variant,
            "ROWS": tile.rows,
            "COLS": tile.cols,
            "CHUNK": tile.chunk,
            # Without effect on 16-bit operands.
            "PRECISION": "tf32" if self.tf32 else "tf32x3",
        }

    @property
    def _row_width(self) -> int:
        return 1 << (padded_dim(self.dim) - 1).bit_length()

    @property
    def _row_warps(self) -> int:
        """At most 8 features in a thread: with 16 some spill."""
        return max(self._row_width // 256, 4)

    @property
    def _row_block(self) -> dict[str, int]:
        """About 512 features a program, in whole rows of one block of any pair kernel."""
        return {"BLOCK_ROWS": self._rows_of(512), "BLOCK_DIM": self._row_width}

    def _prepare_block(self, num_rows: int) -> dict[str, int]:
        """More rows than in ``_row_block`` where there are many: a program reads the labels of all."""
        rows = self._rows_of(2048 if num_rows >= MANY_ROWS else 512, most=16)
        labels = 32 * 32 * PREPARE_WARPS // rows  # 32 comparisons in a thread
        return {"BLOCK_ROWS": rows, "BLOCK_DIM": self._row_width, "WIDTH": min(labels, 2048)}

    def _rows_of(self, features: int, most: int = ROW_PADDING) -> int:
        """Rows of about so many features."""
        if not self.target.capability:  # the interpreter, whose time is that of its programs
            return 32
        return min(max(features // self._row_width, 1), most)

    def _launch(
        self,
        kernel: str,
        arguments: str,
        constexprs: dict[str, Constexpr],
        num_programs: int,
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
        depth = (tile.num_warps, tile.num_stages) if tile else (num_warps, 1)
        registers = None
        if self.target.capability == 100:
            # Left alone, ptxas spills there to have more programs at once; elsewhere it hardly does.
            warps = tile.num_warps * tile.residents if tile else max(num_warps, 16)
            registers = min(REGISTERS // (32 * warps) // 8 * 8, 255)
        grid = (num_programs, 1, 1)
        return Launch(kernel, signature, constexprs, aligned, *depth, grid, registers)

    def _type_of(self, name: str) -> str:
        if name in ("features", "gradient", "rows", "cols", "derivatives"):
            return "*" + _TYPES[self.dtype]
        kinds = (kind for kind, names in _ARGUMENT_TYPES.items() if name in names.split())
        return next(kinds, "i32")


# Calls of one shape share their plan.
plan_of = cast(type[Plan], functools.lru_cache(maxsize=256)(Plan))
