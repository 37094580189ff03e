"""The Triton kernels; docs/kernels.md has the idea, triton_launch.py how they are launched.

Both sides of a call are prepared once: sorted by label, the ignored last, normalised, scaled,
rounded and padded with zero rows. So the positives of a row are a band of columns,
begin ≤ j < end, and the pair kernels never see a label. A pair kernel's program owns a block of
rows and streams the columns. All tiles but a few are plain: every pair in them is a negative (or
just another row, where the loss makes no difference) and nothing is masked. The special tiles,
those that hold the rows themselves or their positives and the last, ragged one, come afterwards.

Exponents are base 2. SHIFTED: the rows carry √(log₂e/τ), so a product is an exponent, and sums of
powers stay within float32's range. Otherwise a scale is applied to products and maxima are kept.
"""

# Arguments of kernels are pointers and numbers on the device, which Python's types do not describe.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, import-not-found"

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
# Below every exponent, and still a number: differences with it are not NaN.
LOWEST = tl.constexpr(-3e38)
NOWHERE = tl.constexpr(2147483647)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """``x`` to the nearest of ``dtype``."""
    if INTERPRETED and dtype == tl.bfloat16:  # it would cut the bits off
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def _rounded_to_tf32(x):
    """``x`` to the nearest number that a product of TF32 sees as it is: of 10 bits of mantissa."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0xFFF + ((bits >> 13) & 1)) & 0xFFFFE000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


# --- rows


@triton.jit(do_not_specialize=["features_ptr", "num_rows", "dim"])
def _prepare_kernel(
    features_ptr,  # (num_rows, dim)
    order_ptr,  # (num_rows,) which feature row is sorted row i
    num_valid_ptr,  # how many rows are not ignored
    rows_ptr,  # out: (padded rows, PADDED_DIM)
    poison_ptr,  # out: (padded rows,) 0, or NaN where the row holds a non-finite element
    num_rows,
    dim,
    fold,  # what every row is multiplied by
    NORMALIZE: tl.constexpr,
    TF32: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """A program owns BLOCK_ROWS sorted rows; ignored rows and padding become zeros."""
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_DIM)
    x = _gathered(features_ptr, order_ptr, num_valid_ptr, i, d, num_rows, dim)
    poison = tl.sum(x * 0.0, axis=1)
    if NORMALIZE:
        unit, _, _ = _normalized(x)
        x = unit
    x = x * fold
    if TF32:  # what goes by class has to be of the very rows that the tensor cores multiply
        x = _rounded_to_tf32(x)
    at = i.to(tl.int64)[:, None] * PADDED_DIM + d[None, :]
    tl.store(rows_ptr + at, _rounded(x, rows_ptr.dtype.element_ty), mask=d[None, :] < PADDED_DIM)
    tl.store(poison_ptr + i, poison)


@triton.jit
def _gathered(features_ptr, order_ptr, num_valid_ptr, i, d, num_rows, dim):
    """Rows ``i`` in sorted order in float32, zero where ignored or beyond the last."""
    taken = i < tl.minimum(tl.load(num_valid_ptr), num_rows)
    source = tl.load(order_ptr + i, mask=taken, other=0)
    mask = taken[:, None] & (d[None, :] < dim)
    return tl.load(features_ptr + source[:, None] * dim + d[None, :], mask=mask, other=0.0).to(
        tl.float32
    )


@triton.jit
def _normalized(x):
    """Unit rows, and the norm as a product of two numbers neither of which over- or underflows."""
    largest = tl.max(tl.abs(x), axis=1)
    largest = tl.where(largest == 0.0, 1.0, largest)
    scaled = tl.div_rn(x, tl.broadcast_to(largest[:, None], x.shape))
    norm = tl.sqrt_rn(tl.sum(scaled * scaled, axis=1))
    norm = tl.where(norm == 0.0, 1.0, norm)
    return tl.div_rn(scaled, tl.broadcast_to(norm[:, None], x.shape)), largest, norm


@triton.jit(do_not_specialize=["features_ptr", "num_rows", "dim", "num_slices"])
def _finish_gradient_kernel(
    slices_ptr,  # (num_slices, padded rows, PADDED_DIM) whose sum, times factor, is the gradient
    features_ptr,  # (num_rows, dim)
    rows_ptr,  # (padded rows, PADDED_DIM) as prepared
    order_ptr,  # (num_rows,)
    num_valid_ptr,
    factor_ptr,  # float64
    gradient_ptr,  # out: (num_rows, dim), of the features
    dots_ptr,  # out: (num_rows,) float64, prepared row · gradient of the prepared row
    num_rows,
    dim,
    num_slices,
    padded_rows,
    NORMALIZE: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """A program owns BLOCK_ROWS rows: adds the slices in order, and goes back through the norm."""
    padded_rows = padded_rows.to(tl.int64)
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_DIM)
    inside = d[None, :] < PADDED_DIM
    at = i.to(tl.int64)[:, None] * PADDED_DIM + d[None, :]
    g = tl.zeros((BLOCK_ROWS, BLOCK_DIM), tl.float32)
    for s in range(num_slices):
        g += tl.load(slices_ptr + s * padded_rows * PADDED_DIM + at, mask=inside)
    g = tl.where(inside, (g.to(tl.float64) * tl.load(factor_ptr)).to(tl.float32), 0.0)

    taken = i < tl.minimum(tl.load(num_valid_ptr), num_rows)
    row = tl.load(rows_ptr + at, mask=inside, other=0.0).to(tl.float64)
    dots = tl.sum(row * g.to(tl.float64), axis=1)
    tl.store(dots_ptr + i, tl.where(taken, dots, 0.0), mask=i < num_rows)

    if NORMALIZE:
        x = _gathered(features_ptr, order_ptr, num_valid_ptr, i, d, num_rows, dim)
        unit, largest, norm = _normalized(x)
        g = g - unit * tl.sum(unit * g, axis=1)[:, None]
        g = tl.div_rn(g, tl.broadcast_to(norm[:, None], g.shape))
        g = tl.div_rn(g, tl.broadcast_to(largest[:, None], g.shape))
        g = tl.where(tl.max(tl.abs(x), axis=1)[:, None] == 0.0, 0.0, g)
    g = tl.where(taken[:, None], g, 0.0)
    target = tl.load(order_ptr + i, mask=i < num_rows, other=0)
    tl.store(
        gradient_ptr + target[:, None] * dim + d[None, :],
        _rounded(g, gradient_ptr.dtype.element_ty),
        mask=(i[:, None] < num_rows) & (d[None, :] < dim),
    )


# --- positives by class, in O(N·D): out/all's attraction and its mean


@triton.jit
def _chunk_sums_kernel(
    rows_ptr,  # (padded rows, PADDED_DIM)
    weights_ptr,  # (padded rows,) float32, if WEIGHTED
    sums_ptr,  # out: (chunks, PADDED_DIM) float64
    WEIGHTED: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """A program owns BLOCK_DIM features of the sum of one chunk of rows."""
    chunk = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    j = chunk * CHUNK + tl.arange(0, CHUNK)
    total = tl.sum(_weighted_rows(rows_ptr, weights_ptr, j, d, j >= 0, WEIGHTED, PADDED_DIM), 0)
    tl.store(sums_ptr + chunk.to(tl.int64) * PADDED_DIM + d, total)


@triton.jit
def _weighted_rows(rows_ptr, weights_ptr, j, d, mask, WEIGHTED: tl.constexpr, PADDED_DIM):
    """Rows ``j`` where ``mask``, in float64, times their weights."""
    at = j.to(tl.int64)[:, None] * PADDED_DIM + d[None, :]
    x = tl.load(rows_ptr + at, mask=mask[:, None], other=0.0).to(tl.float64)
    if WEIGHTED:
        x = x * tl.load(weights_ptr + j, mask=mask, other=0.0).to(tl.float64)[:, None]
    return x


@triton.jit
def _class_sum(
    rows_ptr, weights_ptr, sums_ptr, begin, end, d, WEIGHTED: tl.constexpr, PADDED_DIM, CHUNK
):
    """The sum of rows begin ≤ j < end: whole chunks, and the rows before and after them."""
    first = tl.cdiv(begin, CHUNK)
    last = tl.maximum(end // CHUNK, first)
    k = tl.arange(0, CHUNK)
    j = begin + k
    head = j < tl.minimum(first * CHUNK, end)
    total = tl.sum(_weighted_rows(rows_ptr, weights_ptr, j, d, head, WEIGHTED, PADDED_DIM), 0)
    for c in range(0, last - first, CHUNK):
        c = first + c
        at = (c + k).to(tl.int64)[:, None] * PADDED_DIM + d[None, :]
        total += tl.sum(tl.load(sums_ptr + at, mask=(c + k < last)[:, None], other=0.0), 0)
    j = last * CHUNK + k
    return total + tl.sum(
        _weighted_rows(rows_ptr, weights_ptr, j, d, j < end, WEIGHTED, PADDED_DIM), 0
    )


@triton.jit
def _positive_sums_kernel(
    rows_ptr,  # (padded rows, PADDED_DIM) anchors
    cols_ptr,  # (padded cols, PADDED_DIM) contrasts
    sums_ptr,  # (chunks, PADDED_DIM) float64, of the contrasts
    begin_ptr,  # (num_rows,) the band of positives
    end_ptr,
    own_ptr,  # the column that is the row itself, or -1
    num_valid_ptr,
    totals_ptr,  # out: (feature blocks, padded rows) float64: Σ over the positives of row · col
    padded_rows,
    PADDED_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """A program owns BLOCK_ROWS anchors and BLOCK_DIM features, and goes from class to class."""
    padded_rows = padded_rows.to(tl.int64)
    start = tl.program_id(0) * BLOCK_ROWS
    stop = tl.minimum(start + BLOCK_ROWS, tl.load(num_valid_ptr).to(tl.int32))
    i = start + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    taken = i < stop
    begins = tl.load(begin_ptr + i, mask=taken, other=0)
    ends = tl.load(end_ptr + i, mask=taken, other=0)
    own = tl.load(own_ptr + i, mask=taken, other=-1)
    own_in_band = taken & (own >= begins) & (own < ends)
    x = _weighted_rows(rows_ptr, rows_ptr, i, d, taken, False, PADDED_DIM)
    myself = _weighted_rows(cols_ptr, rows_ptr, own, d, own_in_band, False, PADDED_DIM)
    totals = tl.zeros((BLOCK_ROWS,), tl.float64)
    while start < stop:
        begin = tl.load(begin_ptr + start)
        end = tl.load(end_ptr + start)
        here = taken & (begins == begin) & (ends == end)
        of_class = _class_sum(cols_ptr, rows_ptr, sums_ptr, begin, end, d, False, PADDED_DIM, CHUNK)
        totals += tl.where(here, tl.sum(x * (of_class[None, :] - myself), axis=1), 0.0)
        start += tl.sum(here.to(tl.int32), 0)
    tl.store(totals_ptr + tl.program_id(1) * padded_rows + i, totals)


@triton.jit
def _attraction_kernel(
    rows_ptr,  # (padded rows, PADDED_DIM) the rows pulled
    cols_ptr,  # (padded cols, PADDED_DIM) the rows that pull
    row_pull_ptr,  # (padded rows,) float32, if ROWS_ANCHOR: upstream weight / number of positives
    col_pull_ptr,  # (padded cols,), if COLS_ANCHOR
    sums_ptr,  # (chunks, PADDED_DIM) float64 of the columns, if ROWS_ANCHOR
    weighted_sums_ptr,  # the same with weights, if COLS_ANCHOR
    begin_ptr,  # (rows,) the band of positives
    end_ptr,
    own_ptr,  # the column that is the row itself, or -1
    num_valid_ptr,
    slices_ptr,  # out: (padded rows, PADDED_DIM) float32
    ROWS_ANCHOR: tl.constexpr,
    COLS_ANCHOR: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """A program owns BLOCK_ROWS rows and BLOCK_DIM features of −Σ (pull_i + pull_j) x_j."""
    start = tl.program_id(0) * BLOCK_ROWS
    stop = tl.minimum(start + BLOCK_ROWS, tl.load(num_valid_ptr).to(tl.int32))
    i = start + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    taken = i < stop
    begins = tl.load(begin_ptr + i, mask=taken, other=0)
    ends = tl.load(end_ptr + i, mask=taken, other=0)
    own = tl.load(own_ptr + i, mask=taken, other=-1)
    own_in_band = taken & (own >= begins) & (own < ends)
    plain = tl.zeros((BLOCK_ROWS, BLOCK_DIM), tl.float64)
    weighted = tl.zeros((BLOCK_ROWS, BLOCK_DIM), tl.float64)
    while start < stop:
        begin = tl.load(begin_ptr + start)
        end = tl.load(end_ptr + start)
        here = taken & (begins == begin) & (ends == end)
        if ROWS_ANCHOR:
            of_class = _class_sum(
                cols_ptr, col_pull_ptr, sums_ptr, begin, end, d, False, PADDED_DIM, CHUNK
            )
            plain = tl.where(here[:, None], of_class[None, :], plain)
        if COLS_ANCHOR:
            of_class = _class_sum(
                cols_ptr, col_pull_ptr, weighted_sums_ptr, begin, end, d, True, PADDED_DIM, CHUNK
            )
            weighted = tl.where(here[:, None], of_class[None, :], weighted)
        start += tl.sum(here.to(tl.int32), 0)
    if ROWS_ANCHOR:
        plain -= _weighted_rows(cols_ptr, col_pull_ptr, own, d, own_in_band, False, PADDED_DIM)
        plain *= tl.load(row_pull_ptr + i).to(tl.float64)[:, None]
    if COLS_ANCHOR:
        weighted -= _weighted_rows(cols_ptr, col_pull_ptr, own, d, own_in_band, True, PADDED_DIM)
    gradient = -(plain + weighted)
    at = i.to(tl.int64)[:, None] * PADDED_DIM + d[None, :]
    tl.store(slices_ptr + at, gradient.to(tl.float32))


# --- pairs


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:  # it would multiply the bits of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _scores(
    a,  # the block's rows, where a row is one chunk
    a_ptrs,
    b_ptrs,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products of the block's rows with one tile of columns (ROWS, COLS)."""
    x = tl.zeros((ROWS, COLS), tl.float32)
    if NUM_CHUNKS == 1:
        return _dot(a, tl.trans(tl.load(b_ptrs)), x, PRECISION)
    for _ in range(NUM_CHUNKS):
        x = _dot(tl.load(a_ptrs), tl.trans(tl.load(b_ptrs)), x, PRECISION)
        a_ptrs += CHUNK
        b_ptrs += CHUNK
    return x


@triton.jit
def _uniform(x):
    """A number that the compiler is told to be the same in every thread of a warp.

    One read from memory it would keep in a register of each thread, and with it all that a loop
    of that length counts.
    """
    if INTERPRETED:
        return x
    return tl.inline_asm_elementwise(
        "redux.sync.max.s32 $0, $1, 0xffffffff;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _walk(low, high, num_cols, COLS: tl.constexpr, NARROW: tl.constexpr):
    """Tiles of this split: plain ones around the special ones that touch columns low ≤ j < high.

    Returns:
        The first plain tile, which plain tile the special ones come before, how many plain ones
        there are, and how many tiles of columns are jumped over for them; the first special
        tile, in narrow ones, how many come before the ragged one, where that begins, and how
        many there are in all.
    """
    low = _uniform(low)
    high = _uniform(high)
    num_cols = _uniform(num_cols)
    num_tiles = tl.cdiv(num_cols, COLS)
    first = (num_tiles * tl.program_id(1)) // tl.num_programs(1)
    last = (num_tiles * (tl.program_id(1) + 1)) // tl.num_programs(1)
    whole = tl.maximum(tl.minimum(last, num_cols // COLS), first)
    lo = tl.minimum(tl.maximum(low // COLS, first), whole)
    hi = tl.maximum(tl.minimum(tl.cdiv(high, COLS), last), lo)
    ragged = tl.maximum(hi, whole)
    SUB: tl.constexpr = COLS // NARROW
    num_plain = lo - first + tl.maximum(whole - hi, 0)
    num_special = (hi - lo + last - ragged) * SUB
    return (
        first,
        lo,
        hi - lo,
        num_plain,
        lo * SUB,
        (hi - lo) * SUB,
        (ragged - hi) * SUB,
        num_special,
    )


@triton.jit
def _extent(begin, end, own, taken, BANDED: tl.constexpr):
    """The columns low ≤ j < high among which every positive and every row itself of a block are."""
    has_own = taken & (own >= 0)
    low = tl.min(tl.where(has_own, own, NOWHERE), 0)
    high = tl.max(tl.where(has_own, own + 1, 0), 0)
    if BANDED:
        has_band = taken & (begin < end)
        low = tl.minimum(low, tl.min(tl.where(has_band, begin, NOWHERE), 0))
        high = tl.maximum(high, tl.max(tl.where(has_band, end, 0), 0))
    return low, high


@triton.jit
def _add(exponents, largest, total, SHIFTED: tl.constexpr):
    """Add 2^exponents of each row to total · 2^largest."""
    if SHIFTED:
        return largest, total + tl.sum(tl.exp2(exponents), axis=1)
    new = tl.maximum(largest, tl.max(exponents, axis=1))
    powers = tl.exp2(exponents - new[:, None])
    return new, total * tl.exp2(largest - new) + tl.sum(powers, axis=1)


@triton.jit
def _forward_kernel(
    rows_ptr,  # (padded rows, PADDED_DIM) anchors
    cols_ptr,  # (padded cols, PADDED_DIM) contrasts
    begin_ptr,  # (num_rows,) the band of positives, if BANDED
    end_ptr,
    own_ptr,  # the column that is the row itself, or -1
    num_valid_rows_ptr,  # not ignored
    num_valid_cols_ptr,
    scale_ptr,  # log₂e/τ, unless SHIFTED
    powers_ptr,  # out: (splits, 4, padded rows): sum and maximum of the negatives (of all columns
    # unless BANDED), sum and maximum of the positives
    padded_rows,
    SHIFTED: tl.constexpr,
    BANDED: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    NARROW: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program owns ROWS anchors and one split of the columns; it keeps the sums of powers."""
    padded_rows = padded_rows.to(tl.int64)
    NUM_CHUNKS: tl.constexpr = PADDED_DIM // CHUNK
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLS)
    d = tl.arange(0, CHUNK)
    num_rows = tl.load(num_valid_rows_ptr).to(tl.int32)
    num_cols = tl.load(num_valid_cols_ptr).to(tl.int32)
    taken = i < num_rows
    own = tl.load(own_ptr + i, mask=taken, other=-1)
    begin = i
    end = i
    if BANDED:
        begin = tl.load(begin_ptr + i, mask=taken, other=0)
        end = tl.load(end_ptr + i, mask=taken, other=0)
    low, high = _extent(begin, end, own, taken, BANDED)
    first, lo, jump, num_plain, special, before, gap, num_special = _walk(
        low, high, num_cols, COLS, NARROW
    )
    scale = 1.0
    if not SHIFTED:
        scale = tl.load(scale_ptr)

    a_ptrs = rows_ptr + i.to(tl.int64)[:, None] * PADDED_DIM + d[None, :]
    b_offsets = k[:, None] * PADDED_DIM + d[None, :]
    a = tl.load(a_ptrs)
    largest = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if SHIFTED:
        largest = tl.zeros((ROWS,), tl.float32)
        # A sum for each place of the tile: adding along rows waits until the end.
        places = tl.zeros((ROWS, COLS), tl.float32)
    for n in range(num_plain):
        tile = first + n
        tile += tl.where(tile >= lo, jump, 0)
        b_ptrs = cols_ptr + tile.to(tl.int64) * (COLS * PADDED_DIM) + b_offsets
        x = _scores(a, a_ptrs, b_ptrs, ROWS, COLS, NUM_CHUNKS, CHUNK, PRECISION)
        if SHIFTED:
            places += tl.exp2(x)
        else:
            largest, total = _add(x * scale, largest, total, False)
    if SHIFTED:
        total = tl.sum(places, axis=1)

    pos_largest = largest * 0.0 if SHIFTED else tl.full((ROWS,), LOWEST, tl.float32)
    pos_total = tl.zeros((ROWS,), tl.float32)
    narrow = tl.arange(0, NARROW)
    narrow_offsets = narrow[:, None] * PADDED_DIM + d[None, :]
    for n in tl.range(num_special, num_stages=1):
        tile = special + n + tl.where(n < before, 0, gap)
        b_ptrs = cols_ptr + tile.to(tl.int64) * (NARROW * PADDED_DIM) + narrow_offsets
        x = _scores(a, a_ptrs, b_ptrs, ROWS, NARROW, NUM_CHUNKS, CHUNK, PRECISION)
        if not SHIFTED:
            x = x * scale
        j = (tile * NARROW + narrow)[None, :]
        counts = (j < num_cols) & (j != own[:, None])
        if BANDED:
            positive = counts & (j >= begin[:, None]) & (j < end[:, None])
            y = tl.where(positive, x, float("-inf"))
            pos_largest, pos_total = _add(y, pos_largest, pos_total, SHIFTED)
            counts = counts & (positive == 0)
        largest, total = _add(tl.where(counts, x, float("-inf")), largest, total, SHIFTED)

    out = powers_ptr + tl.program_id(1) * padded_rows * 4 + i
    tl.store(out, total)
    tl.store(out + padded_rows, largest)
    tl.store(out + 2 * padded_rows, pos_total)
    tl.store(out + 3 * padded_rows, pos_largest)


@triton.jit
def _log_sum(powers_ptr, i, which, num_splits, padded_rows):
    """log₂ of a sum over all splits in float64, -inf where it is empty."""
    out = powers_ptr + which * padded_rows + i
    step = padded_rows * 4
    largest = tl.full(i.shape, LOWEST, tl.float32)
    for s in range(num_splits):
        here = tl.load(out + s * step)
        largest = tl.where(
            here > 0.0, tl.maximum(largest, tl.load(out + s * step + padded_rows)), largest
        )
    total = tl.zeros(i.shape, tl.float64)
    for s in range(num_splits):
        shift = tl.load(out + s * step + padded_rows).to(tl.float64) - largest.to(tl.float64)
        here = tl.load(out + s * step).to(tl.float64)
        total += tl.where(here == 0.0, 0.0, here * tl.exp2(shift))
    return tl.log2(total) + tl.where(total == 0.0, 0.0, largest.to(tl.float64))


@triton.jit
def _sigmoid(d):
    """q = 1 / (1 + 2^-d), 1 - q, and log₂ q, none of them by a difference."""
    t = tl.exp2(-tl.abs(d))
    near = 1.0 / (1.0 + t)
    far = t * near
    log_q = tl.minimum(d, 0.0) - tl.log2(1.0 + t)
    return tl.where(d >= 0.0, near, far), tl.where(d >= 0.0, far, near), log_q


@triton.jit(do_not_specialize=["num_splits"])
def _one_positive_kernel(
    rows_ptr,  # (padded rows, PADDED_DIM) anchors
    cols_ptr,  # (padded cols, PADDED_DIM) contrasts
    begin_ptr,  # (num_rows,) the band of positives
    end_ptr,
    own_ptr,  # the column that is the row itself, or -1
    num_valid_rows_ptr,
    num_valid_cols_ptr,
    scale_ptr,
    powers_ptr,  # (splits, 4, padded rows) from the forward kernel
    logits_ptr,  # out: (2, padded rows) OUT: Σ log₂ q and Σ (1 - q) over the positives;
    # otherwise log₂ Σ q, and Σ q (1 - q) / Σ q
    padded_rows,
    num_splits,
    SHIFTED: tl.constexpr,
    OUT: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program owns ROWS anchors and visits the tiles that hold their positives."""
    padded_rows = padded_rows.to(tl.int64)
    NUM_CHUNKS: tl.constexpr = PADDED_DIM // CHUNK
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLS)
    d = tl.arange(0, CHUNK)
    taken = i < tl.load(num_valid_rows_ptr).to(tl.int32)
    num_cols = tl.load(num_valid_cols_ptr).to(tl.int32)
    own = tl.load(own_ptr + i, mask=taken, other=-1)
    begin = tl.load(begin_ptr + i, mask=taken, other=0)
    end = tl.load(end_ptr + i, mask=taken, other=0)
    low, high = _extent(begin, end, begin, taken & (begin < end), True)
    lse = _log_sum(powers_ptr, i, 0, num_splits, padded_rows).to(tl.float32)
    scale = 1.0
    if not SHIFTED:
        scale = tl.load(scale_ptr)

    a_ptrs = rows_ptr + i.to(tl.int64)[:, None] * PADDED_DIM + d[None, :]
    b_offsets = k[:, None] * PADDED_DIM + d[None, :]
    a = tl.load(a_ptrs)
    largest = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    rest = tl.zeros((ROWS,), tl.float32)
    first = low // COLS
    for n in tl.range(tl.cdiv(high, COLS) - first, num_stages=1):
        tile = first + n
        b_ptrs = cols_ptr + tile.to(tl.int64) * (COLS * PADDED_DIM) + b_offsets
        x = _scores(a, a_ptrs, b_ptrs, ROWS, COLS, NUM_CHUNKS, CHUNK, PRECISION)
        j = (tile * COLS + k)[None, :]
        positive = (j < num_cols) & (j != own[:, None])
        positive = positive & (j >= begin[:, None]) & (j < end[:, None])
        _, not_q, log_q = _sigmoid(x * scale - lse[:, None])
        if OUT:
            total += tl.sum(tl.where(positive, log_q, 0.0), axis=1)
            rest += tl.sum(tl.where(positive, not_q, 0.0), axis=1)
        else:
            log_q = tl.where(positive, log_q, float("-inf"))
            new = tl.maximum(largest, tl.max(log_q, axis=1))
            q = tl.exp2(log_q - new[:, None])
            total = total * tl.exp2(largest - new) + tl.sum(q, axis=1)
            rest = rest * tl.exp2(largest - new) + tl.sum(q * not_q, axis=1)
            largest = new
    if not OUT:
        rest = rest / tl.where(total == 0.0, 1.0, total)
        total = largest + tl.log2(total)
    tl.store(logits_ptr + i, total)
    tl.store(logits_ptr + padded_rows + i, rest)


@triton.jit(do_not_specialize=["num_rows", "num_splits", "num_totals"])
def _finish_loss_kernel(
    powers_ptr,  # (splits, 4, padded rows) from the forward kernel
    totals_ptr,  # (num_totals, padded rows) float64: Σ over the positives of row · col, if OUT
    logits_ptr,  # (2, padded rows), if ONE_POSITIVE
    order_ptr,  # (num_rows,)
    begin_ptr,
    end_ptr,
    own_ptr,  # the column that is the row itself, or -1
    num_valid_rows_ptr,
    num_valid_cols_ptr,
    scale_ptr,
    poison_ptr,  # 0 or NaN
    loss_ptr,  # out: (num_rows,) in the order of the features
    stats_ptr,  # out: (3, num_rows) float64 in that order, see the backend
    contributes_ptr,  # out: (padded rows,) float32, 1 or 0, sorted
    num_rows,
    padded_rows,
    num_splits,
    num_totals,
    SHIFTED: tl.constexpr,
    OUT: tl.constexpr,
    DENOMINATOR: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program owns ROWS anchors: their losses and statistics, from the sums, in float64."""
    padded_rows = padded_rows.to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    taken = i < tl.load(num_valid_rows_ptr).to(tl.int32)
    num_cols = tl.load(num_valid_cols_ptr).to(tl.int32)
    own = tl.load(own_ptr + i, mask=taken, other=-1)
    begin = tl.load(begin_ptr + i, mask=taken, other=0)
    end = tl.load(end_ptr + i, mask=taken, other=0)
    has_own = (own >= 0) & (own < num_cols)
    num_positives = end - begin - ((own >= begin) & (own < end)).to(tl.int32)
    contributes = taken & (num_positives > 0)
    if DENOMINATOR == "only_negatives":
        contributes = contributes & (num_cols - has_own.to(tl.int32) > num_positives)
    count = tl.where(contributes, num_positives, 1).to(tl.float64)

    lse = _log_sum(powers_ptr, i, 0, num_splits, padded_rows)
    weight = tl.full((ROWS,), 1.0, tl.float64)
    normaliser = count
    if DENOMINATOR == "one_positive":
        total = tl.load(logits_ptr + i).to(tl.float64)
        rest = tl.load(logits_ptr + padded_rows + i).to(tl.float64)
        if OUT:
            loss = -total / count
            weight = rest / count
        else:
            loss = tl.log2(count) - total
            weight = rest
            normaliser = total
    elif OUT:
        total = tl.zeros((ROWS,), tl.float64)
        for t in range(num_totals):
            total += tl.load(totals_ptr + t * padded_rows + i)
        if not SHIFTED:
            total *= tl.load(scale_ptr).to(tl.float64)
        loss = lse - total / count
        if DENOMINATOR == "all":  # what the positives hold, all hold: below zero it is roundings
            loss = tl.where(loss < 0.0, 0.0, loss)
    else:
        normaliser = _log_sum(powers_ptr, i, 2, num_splits, padded_rows)
        if DENOMINATOR == "all":
            high = tl.maximum(lse, normaliser)
            lse = high + tl.log2(tl.exp2(lse - high) + tl.exp2(normaliser - high))
        loss = lse - normaliser + tl.log2(count)

    loss = tl.where(contributes, loss * LN2, 0.0) + tl.load(poison_ptr)
    loss = tl.where(taken, loss, 0.0)
    target = tl.load(order_ptr + i, mask=i < num_rows, other=0)
    written = i < num_rows
    tl.store(loss_ptr + target, loss.to(tl.float32), mask=written)
    step = num_rows.to(tl.int64)
    infinity = float("inf")
    tl.store(stats_ptr + target, tl.where(contributes, lse, infinity), mask=written)
    tl.store(stats_ptr + step + target, tl.where(contributes, normaliser, infinity), mask=written)
    tl.store(stats_ptr + 2 * step + target, tl.where(contributes, weight, 0.0), mask=written)
    tl.store(contributes_ptr + i, contributes.to(tl.float32))


@triton.jit(do_not_specialize=["upstream_ptr", "num_rows", "upstream_stride"])
def _weights_kernel(
    upstream_ptr,  # (num_rows,) float32 gradient of each loss, in the order of the features
    peak_ptr,  # the largest magnitude in it
    stats_ptr,  # (3, num_rows) float64
    order_ptr,  # (num_rows,)
    weights_ptr,  # out: (4, padded rows) float32: weight and log₂ of what it is divided by, for
    # the softmax; the same for the pull of positives
    num_rows,
    padded_rows,
    upstream_stride,
    headroom,  # what keeps 16-bit operands from being subnormal
    SHIFTED: tl.constexpr,
    OUT: tl.constexpr,
    DENOMINATOR: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program owns ROWS anchors, 0 for padding. SHIFTED weights are divided already."""
    padded_rows = padded_rows.to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = i < num_rows
    source = tl.load(order_ptr + i, mask=mask, other=0)
    step = num_rows.to(tl.int64)
    lse = tl.load(stats_ptr + source, mask=mask, other=float("inf"))
    normaliser = tl.load(stats_ptr + step + source, mask=mask, other=float("inf"))
    weight = tl.load(stats_ptr + 2 * step + source, mask=mask, other=0.0)
    mask = mask & (normaliser != float("inf"))
    upstream = tl.load(upstream_ptr + source * upstream_stride, mask=mask, other=0.0)
    peak = tl.load(peak_ptr)
    upstream = upstream.to(tl.float64) / tl.where(peak == 0.0, 1.0, peak).to(tl.float64)
    upstream = tl.where(mask, upstream * headroom, 0.0)

    weight = weight * upstream
    if SHIFTED:
        weight = tl.where(weight == 0.0, 0.0, weight * tl.exp2(-lse))
    lse = tl.where(mask, lse, 0.0)
    rounded = lse.to(tl.float32)
    if not SHIFTED:  # what rounding takes off the logarithm, the weight puts back
        off = tl.where(lse == float("-inf"), 0.0, rounded.to(tl.float64) - lse)
        weight *= tl.exp2(off)
    tl.store(weights_ptr + i, weight.to(tl.float32))
    # Infinite where an anchor does not contribute: no weight of 0 may meet a power that overflows.
    tl.store(weights_ptr + padded_rows + i, tl.where(mask, rounded, float("inf")))

    if OUT:
        pull = upstream / normaliser
        pull_lse = tl.zeros((ROWS,), tl.float32)
    else:
        normaliser = tl.where(mask, normaliser, 0.0)
        pull_lse = normaliser.to(tl.float32)
        if SHIFTED and DENOMINATOR != "one_positive":
            pull = upstream * tl.exp2(-normaliser)
        else:
            pull = upstream * tl.exp2(pull_lse.to(tl.float64) - normaliser)
    tl.store(weights_ptr + 2 * padded_rows + i, pull.to(tl.float32))
    tl.store(weights_ptr + 3 * padded_rows + i, tl.where(mask, pull_lse, float("inf")))


@triton.jit
def _pull(
    x,  # exponents (ROWS, COLS)
    power,  # 2^x, if SHIFTED
    pull,  # of the anchors, broadcastable to the tile
    lse,  # of their negatives, if DENOMINATOR is "one_positive"
    pull_lse,  # log₂ of what their positives are divided by, unless OUT
    SHIFTED: tl.constexpr,
    OUT: tl.constexpr,
    DENOMINATOR: tl.constexpr,
):
    """What a positive takes off the derivative of its pair."""
    if DENOMINATOR == "one_positive":
        _, not_q, log_q = _sigmoid(x - lse)
        if OUT:
            return pull * not_q
        return pull * tl.exp2(log_q - pull_lse) * not_q
    if OUT:
        return pull + tl.zeros_like(x)
    if SHIFTED:
        return pull * power
    return pull * tl.exp2(x - pull_lse)


@triton.jit
def _softmax(
    x,
    row_weight,
    row_lse,
    col_weight,
    col_lse,
    SHIFTED: tl.constexpr,
    ROWS_ANCHOR: tl.constexpr,
    COLS_ANCHOR: tl.constexpr,
):
    """Both anchors' parts of the derivative of a pair as any column of a softmax, and 2^x."""
    if SHIFTED:
        power = tl.exp2(x)
        if ROWS_ANCHOR and COLS_ANCHOR:
            return power * (row_weight[:, None] + col_weight[None, :]), power
        if ROWS_ANCHOR:
            return power * row_weight[:, None], power
        return power * col_weight[None, :], power
    h = tl.zeros_like(x)
    if ROWS_ANCHOR:
        h += row_weight[:, None] * tl.exp2(x - row_lse[:, None])
    if COLS_ANCHOR:
        h += col_weight[None, :] * tl.exp2(x - col_lse[None, :])
    return h, h


@triton.jit
def _backward_kernel(
    rows_ptr,  # (padded rows, PADDED_DIM) whose gradient this is
    cols_ptr,  # (padded cols, PADDED_DIM) streamed
    begin_ptr,  # (rows,) the band of positives that are told apart; empty where none are
    end_ptr,
    own_ptr,  # the column that is the row itself, or -1
    row_weights_ptr,  # (4, padded rows) from the weights kernel, if ROWS_ANCHOR
    col_weights_ptr,  # (4, padded cols), if COLS_ANCHOR
    num_valid_rows_ptr,
    num_valid_cols_ptr,
    scale_ptr,
    slices_ptr,  # out: (splits, padded rows, PADDED_DIM)
    padded_rows,
    padded_cols,
    SHIFTED: tl.constexpr,
    OUT: tl.constexpr,
    DENOMINATOR: tl.constexpr,
    ROWS_ANCHOR: tl.constexpr,
    COLS_ANCHOR: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    NARROW: tl.constexpr,
    CHUNK: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program owns SLICE features of ROWS rows' gradient for one split of the columns.

    It keeps Σ H_ij col_j, H being the derivative of the loss by each exponent as seen from every
    side that is an anchor: from both, where the rows are contrasted with each other.
    """
    padded_rows = padded_rows.to(tl.int64)
    padded_cols = padded_cols.to(tl.int64)
    NUM_CHUNKS: tl.constexpr = PADDED_DIM // CHUNK
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLS)
    d = tl.arange(0, CHUNK)
    kept = d  # the very columns that were multiplied, where they are one chunk
    if NUM_CHUNKS > 1:
        kept = tl.program_id(2) * SLICE + tl.arange(0, SLICE)
    num_cols = tl.load(num_valid_cols_ptr).to(tl.int32)
    taken = i < tl.load(num_valid_rows_ptr).to(tl.int32)
    own = tl.load(own_ptr + i, mask=taken, other=-1)
    begin = tl.load(begin_ptr + i, mask=taken, other=0)
    end = tl.load(end_ptr + i, mask=taken, other=0)
    low, high = _extent(begin, end, own, taken, True)
    first, lo, jump, num_plain, special, before, gap, num_special = _walk(
        low, high, num_cols, COLS, NARROW
    )
    scale = 1.0
    if not SHIFTED:
        scale = tl.load(scale_ptr)

    row_weight = tl.zeros((ROWS,), tl.float32)
    row_lse = row_weight
    if ROWS_ANCHOR:
        row_weight = tl.load(row_weights_ptr + i)
        row_lse = tl.load(row_weights_ptr + padded_rows + i)
    a_ptrs = rows_ptr + i.to(tl.int64)[:, None] * PADDED_DIM + d[None, :]
    b_offsets = k[:, None] * PADDED_DIM + d[None, :]
    kept_offsets = k[:, None] * PADDED_DIM + kept[None, :]
    a = tl.load(a_ptrs)
    gradient = tl.zeros((ROWS, SLICE), tl.float32)
    col_weight = tl.zeros((COLS,), tl.float32)
    col_lse = col_weight
    for n in range(num_plain):
        tile = first + n
        tile += tl.where(tile >= lo, jump, 0)
        tile_ptr = cols_ptr + tile.to(tl.int64) * (COLS * PADDED_DIM)
        if COLS_ANCHOR:
            col_weight = tl.load(col_weights_ptr + tile * COLS + k)
            if not SHIFTED:
                col_lse = tl.load(col_weights_ptr + padded_cols + tile * COLS + k)
        x = _scores(a, a_ptrs, tile_ptr + b_offsets, ROWS, COLS, NUM_CHUNKS, CHUNK, PRECISION)
        if not SHIFTED:
            x = x * scale
        h, _ = _softmax(
            x, row_weight, row_lse, col_weight, col_lse, SHIFTED, ROWS_ANCHOR, COLS_ANCHOR
        )
        b = tl.load(tile_ptr + kept_offsets)
        gradient = _dot(_rounded(h, b.dtype), b, gradient, PRECISION)

    row_pull = tl.zeros((ROWS,), tl.float32)
    row_pull_lse = row_pull
    if ROWS_ANCHOR:
        row_pull = tl.load(row_weights_ptr + 2 * padded_rows + i)
        row_pull_lse = tl.load(row_weights_ptr + 3 * padded_rows + i)
    narrow = tl.arange(0, NARROW)
    narrow_offsets = narrow[:, None] * PADDED_DIM + d[None, :]
    narrow_kept_offsets = narrow[:, None] * PADDED_DIM + kept[None, :]
    col_weight = tl.zeros((NARROW,), tl.float32)
    col_lse = col_weight
    col_pull = col_weight
    col_pull_lse = col_weight
    for n in tl.range(num_special, num_stages=1):
        tile = special + n + tl.where(n < before, 0, gap)
        tile_ptr = cols_ptr + tile.to(tl.int64) * (NARROW * PADDED_DIM)
        if COLS_ANCHOR:
            col_weight = tl.load(col_weights_ptr + tile * NARROW + narrow)
            col_lse = tl.load(col_weights_ptr + padded_cols + tile * NARROW + narrow)
            col_pull = tl.load(col_weights_ptr + 2 * padded_cols + tile * NARROW + narrow)
            col_pull_lse = tl.load(col_weights_ptr + 3 * padded_cols + tile * NARROW + narrow)
        x = _scores(
            a, a_ptrs, tile_ptr + narrow_offsets, ROWS, NARROW, NUM_CHUNKS, CHUNK, PRECISION
        )
        if not SHIFTED:
            x = x * scale
        h, power = _softmax(
            x, row_weight, row_lse, col_weight, col_lse, SHIFTED, ROWS_ANCHOR, COLS_ANCHOR
        )
        j = (tile * NARROW + narrow)[None, :]
        begin = tl.load(begin_ptr + i, mask=taken, other=0)
        end = tl.load(end_ptr + i, mask=taken, other=0)
        positive = (j >= begin[:, None]) & (j < end[:, None])
        of_positive = tl.zeros_like(h)
        if DENOMINATOR == "all":
            of_positive = h
        if ROWS_ANCHOR:
            of_positive -= _pull(
                x,
                power,
                row_pull[:, None],
                row_lse[:, None],
                row_pull_lse[:, None],
                SHIFTED,
                OUT,
                DENOMINATOR,
            )
        if COLS_ANCHOR:
            of_positive -= _pull(
                x,
                power,
                col_pull[None, :],
                col_lse[None, :],
                col_pull_lse[None, :],
                SHIFTED,
                OUT,
                DENOMINATOR,
            )
        h = tl.where(positive, of_positive, h)
        h = tl.where((j < num_cols) & (j != own[:, None]), h, 0.0)
        b = tl.load(tile_ptr + narrow_kept_offsets)
        gradient = _dot(_rounded(h, b.dtype), b, gradient, PRECISION)

    out = slices_ptr + tl.program_id(1) * padded_rows * PADDED_DIM
    out += i.to(tl.int64)[:, None] * PADDED_DIM + kept[None, :]
    tl.store(out, gradient)
