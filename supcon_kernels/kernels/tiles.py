"""What the pair kernels share: shares of the work, tiles of exponents, roundings.

Exponents are base 2. Where sums of powers stay within float32's range (``fits``) the prepared rows
carry √(log₂e/τ), and a product is an exponent. Elsewhere rows are as given, products are multiplied
by log₂e/τ, and maxima are kept: RUNNING.
"""

# Arguments of kernels are pointers and numbers on the device, which Python's types do not describe.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, import-not-found"

import triton
import triton.language as tl

from supcon_kernels import triton_launch

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(triton_launch.LOWEST)
COLDEST = tl.constexpr(triton_launch.FITTING_TEMPERATURES[0])
HOTTEST = tl.constexpr(triton_launch.FITTING_TEMPERATURES[1])


@triton.jit
def temperature_of(host_temperature, temperature_ptr, on_device):
    """τ, given by the host or read here."""
    if on_device:
        host_temperature = tl.load(temperature_ptr)
    return host_temperature


@triton.jit
def fits(temperature):
    """Whether sums of powers of unit rows need no maximum."""
    return (temperature >= COLDEST) & (temperature <= HOTTEST)


@triton.jit
def classes_of(rows_ptr, padded_rows, padded_dim):
    """Where a side's classes are, (padded rows,) int32: behind its prepared rows."""
    end_ptr = rows_ptr + padded_rows.to(tl.int64) * padded_dim
    return end_ptr.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """``x`` to the nearest of ``dtype``."""
    if INTERPRETED and dtype == tl.bfloat16:  # it would cut the bits off
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def rounded_to_tf32(x):
    """``x`` to the nearest number that a product of TF32 sees as it is: of 10 bits of mantissa."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0xFFF + ((bits >> 13) & 1)) & 0xFFFFE000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b."""
    if INTERPRETED:  # it would multiply the bits of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def exponents(
    a,  # the block's rows, where a row is one chunk
    a_ptrs,  # (ROWS, CHUNK) of the first chunk
    b_ptrs,  # (COLS, CHUNK)
    num_chunks,  # of a row
    scale,  # log₂e/τ, if RUNNING
    ONE_CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    RUNNING: tl.constexpr,
):
    """Exponents of the block's rows with one tile of columns (ROWS, COLS)."""
    x = tl.zeros((a_ptrs.shape[0], b_ptrs.shape[0]), tl.float32)
    if ONE_CHUNK:
        x = dot(a, tl.trans(tl.load(b_ptrs)), x, PRECISION)
    else:
        for _ in range(num_chunks):
            x = dot(tl.load(a_ptrs), tl.trans(tl.load(b_ptrs)), x, PRECISION)
            a_ptrs += a_ptrs.shape[1]
            b_ptrs += b_ptrs.shape[1]
    if RUNNING:
        x = x * scale
    return x


@triton.jit
def reciprocal(x):
    """1 / x by the hardware's own, which is within one unit in the last place."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def logarithm(x):
    """log₂ x by the hardware's own, within 2^-22 of it, and of 1."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def sigmoid(d):
    """For q = 1 / (1 + 2^-d): the smaller of 2^d and 2^-d, and q and 1 - q, neither by a difference."""
    t = tl.exp2(-tl.abs(d))
    near = reciprocal(1.0 + t)
    far = t * near
    return t, tl.where(d >= 0.0, near, far), tl.where(d >= 0.0, far, near)


@triton.jit
def run_of(num_blocks, num_tiles, group, share):
    """A program's run: its number in its group, the group's first block, the first and last tile of these."""
    num_runs = tl.cdiv(group * num_tiles, share)
    run = tl.program_id(0) % num_runs
    start = tl.program_id(0) // num_runs * group
    first = run * share
    last = tl.minimum(first + share, tl.minimum(group, num_blocks - start) * num_tiles)
    return run, start, first, last


@triton.jit
def parts_of(first, last, num_tiles, own, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Where a block's tiles begin, those among them that hold a row itself begin and end, and all end.

    Args:
        first, last: the program's run, counted from the block's first tile.
        num_tiles: of the block.
        own: the column that is the block's first row, or below -ROWS.
    """
    begin = tl.maximum(first, 0)
    end = tl.minimum(last, num_tiles)
    lo = tl.minimum(tl.maximum(tl.maximum(own, 0) // COLS, begin), end)
    hi = tl.maximum(tl.minimum(tl.cdiv(tl.maximum(own + ROWS, 0), COLS), end), lo)
    return begin, lo, hi, end


@triton.jit
def pieces_of(block, num_tiles, group, share):
    """In how many pieces a block is done."""
    before = block % group * num_tiles
    return (before + num_tiles - 1) // share - before // share + 1


@triton.jit
def merged(sums_ptr, i, mask, padded_rows, num_pieces, max_pieces):
    """The total of rows ``i`` over the pieces of their blocks, and the exponent that it is shifted by.

    Args:
        sums_ptr: (pieces, 4, padded rows) of which the first two are wanted, the total and the shift.
        i, mask: the rows.
        padded_rows: as in the kernel that made the sums.
        num_pieces: of the rows' blocks.
        max_pieces: of any block.
    """
    largest = tl.full(i.shape, LOWEST, tl.float32)
    total = tl.zeros(i.shape, tl.float32)
    for piece in range(max_pieces):
        at = sums_ptr + piece * 4 * padded_rows + i
        here = tl.load(at, mask=mask & (piece < num_pieces), other=0.0)
        shift = tl.load(at + padded_rows, mask=mask & (piece < num_pieces), other=LOWEST)
        new = tl.maximum(largest, shift)
        total = total * tl.exp2(largest - new) + here * tl.exp2(shift - new)
        largest = new
    return total, largest


@triton.jit
def log_sum(total, largest):
    """log₂(total · 2^largest)."""
    return tl.log2(total) + largest
