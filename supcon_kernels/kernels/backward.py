"""The backward over pairs: H, the derivative of the loss by each exponent, times the columns.

Up to 256 features H stays in registers and is multiplied there. Wider rows' gradient does not fit beside
it: a block of H is written, and multiplied by torch's own product.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, import-not-found"

import triton
import triton.language as tl

from supcon_kernels.kernels.tiles import (
    LN2,
    classes_of,
    dot,
    exponents,
    fits,
    parts_of,
    reciprocal,
    rounded,
    rounded_to_tf32,
    run_of,
    sigmoid,
    temperature_of,
)


@triton.jit
def softmax(x, power, weight, lse, RUNNING: tl.constexpr):
    """weight · 2^(x - lse); the weight holds 2^-lse unless RUNNING."""
    if RUNNING:  # no exponent of the sum exceeds lse: what does is multiplied with 0
        power = tl.exp2(tl.minimum(x - lse, 1.0))
    return weight * power


@triton.jit
def weights_of(weights_ptr, i, padded, AXIS: tl.constexpr, USES_LSE: tl.constexpr):
    """What anchors ``i`` weigh along AXIS of a tile, by (4, padded) of the weights kernel."""
    weight = tl.expand_dims(tl.load(weights_ptr + i), AXIS)
    pull_weight = tl.expand_dims(tl.load(weights_ptr + 2 * padded + i), AXIS)
    lse = weight
    pos_lse = weight
    if USES_LSE:
        lse = tl.expand_dims(tl.load(weights_ptr + padded + i), AXIS)
        pos_lse = tl.expand_dims(tl.load(weights_ptr + 3 * padded + i), AXIS)
    return weight, lse, pull_weight, pos_lse


@triton.jit
def seen_by(
    weights,  # of the anchors; for "one_positive" lse is 2^lse, and in the pull's weight, unless RUNNING
    x,  # exponents (ROWS, COLS)
    power,  # 2^x, unless RUNNING
    RUNNING: tl.constexpr,
    OUT: tl.constexpr,
    DENOMINATOR: tl.constexpr,
):
    """The derivative of a pair by its exponent, and what a positive takes off it."""
    weight, lse, pull_weight, pos_lse = weights
    h = softmax(x, power, weight, lse, RUNNING)
    if DENOMINATOR == "one_positive" and RUNNING:
        _, q, not_q = sigmoid(x - lse)
        pull = pull_weight * not_q
        if not OUT:  # q by its logarithm, of which 1 / (1 + t) is no part that could underflow
            pull *= tl.exp2(tl.minimum(x - lse, 0.0) - pos_lse) * tl.maximum(q, not_q)
    elif DENOMINATOR == "one_positive":
        inverse = reciprocal(power + lse)
        pull = pull_weight * inverse
        if not OUT:
            pull *= tl.exp2(x - pos_lse) * inverse
    elif OUT:
        pull = tl.broadcast_to(pull_weight, x.shape)
    else:
        pull = softmax(x, power, pull_weight, pos_lse, RUNNING)
    return h, pull


@triton.jit
def derivatives(
    x,  # exponents (ROWS, COLS)
    row_weights,  # of the anchors along the rows, if ROWS_ANCHOR
    col_weights_ptr,  # (4, padded cols), if COLS_ANCHOR
    j,  # the tile's columns
    padded_cols,
    positive,  # (ROWS, COLS) where a pair is of one class
    RUNNING: tl.constexpr,
    OUT: tl.constexpr,
    DENOMINATOR: tl.constexpr,
    ROWS_ANCHOR: tl.constexpr,
    COLS_ANCHOR: tl.constexpr,
):
    """H of a tile: the derivative by each exponent, as seen from every side that is an anchor."""
    USES_LSE: tl.constexpr = RUNNING or DENOMINATOR == "one_positive"
    power = x
    if not RUNNING:
        power = tl.exp2(x)
    if ROWS_ANCHOR:
        h, pull = seen_by(row_weights, x, power, RUNNING, OUT, DENOMINATOR)
    if COLS_ANCHOR:
        col_weights = weights_of(col_weights_ptr, j, padded_cols, 0, USES_LSE)
        col_h, col_pull = seen_by(col_weights, x, power, RUNNING, OUT, DENOMINATOR)
        h = h + col_h if ROWS_ANCHOR else col_h
        pull = pull + col_pull if ROWS_ANCHOR else col_pull
    of_positive = h - pull if DENOMINATOR == "all" else -pull
    return tl.where(positive, of_positive, h)


@triton.jit
def _backward_kernel(
    rows_ptr,  # (padded rows, PADDED_DIM) whose gradient this is, and their classes
    cols_ptr,  # (padded cols, PADDED_DIM) streamed, and their classes
    row_weights_ptr,  # (4, padded rows) from the weights kernel, if ROWS_ANCHOR
    col_weights_ptr,  # (4, padded cols), if COLS_ANCHOR
    temperature_ptr,
    slices_ptr,  # out: (pieces, padded rows, PADDED_DIM)
    padded_rows,
    padded_cols,
    num_blocks,  # of rows
    num_tiles,  # of columns
    group,  # blocks that are cut together
    share,  # tiles of a program
    own_offset,  # the column that is row 0 itself, or far below 0
    host_temperature,
    on_device,  # whether the temperature is read there
    either,  # whether it decides which of two kernels returns at once: this, or that with other RUNNING
    RUNNING: tl.constexpr,
    OUT: tl.constexpr,
    DENOMINATOR: tl.constexpr,
    ROWS_ANCHOR: tl.constexpr,
    COLS_ANCHOR: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program owns ``share`` tiles, of one block of rows after the other.

    It keeps Σ H_ij col_j of a block, H being the derivative as seen from every side that is an
    anchor: from both, where the rows are contrasted with each other.
    """
    tau = temperature_of(host_temperature, temperature_ptr, on_device)
    if (either != 0) & (fits(tau) == RUNNING):
        return
    scale = 1.0 / (tau * LN2)
    row_ids_ptr = classes_of(rows_ptr, padded_rows, PADDED_DIM)
    col_ids_ptr = classes_of(cols_ptr, padded_cols, PADDED_DIM)
    USES_LSE: tl.constexpr = RUNNING or DENOMINATOR == "one_positive"
    padded_rows = padded_rows.to(tl.int64)
    padded_cols = padded_cols.to(tl.int64)
    k = tl.arange(0, COLS)
    d = tl.arange(0, CHUNK)
    num_chunks: tl.constexpr = PADDED_DIM // CHUNK
    kept = tl.arange(0, PADDED_DIM)
    b_offsets = k[:, None] * PADDED_DIM + d[None, :]
    kept_offsets = k[:, None] * PADDED_DIM + kept[None, :]
    run, start, first, last = run_of(num_blocks, num_tiles, group, share)
    for block in range(first // num_tiles, tl.cdiv(last, num_tiles)):
        before = block * num_tiles
        own = own_offset + (start + block) * ROWS
        parts = parts_of(first - before, last - before, num_tiles, own, ROWS, COLS)
        i = (start + block) * ROWS + tl.arange(0, ROWS)
        a_ptrs = rows_ptr + i.to(tl.int64)[:, None] * PADDED_DIM + d[None, :]
        a = tl.load(a_ptrs)
        row_id = tl.load(row_ids_ptr + i)
        row_weights = i
        if ROWS_ANCHOR:
            row_weights = weights_of(row_weights_ptr, i, padded_rows, 1, USES_LSE)
        gradient = tl.zeros((ROWS, PADDED_DIM), tl.float32)

        # The tiles before those that hold a row itself, those, and the tiles after them.
        for part in tl.static_range(3):
            for tile in range(parts[part], parts[part + 1]):
                j = tile * COLS + k
                tile_ptr = cols_ptr + tl.cast(tile, tl.int64) * (COLS * PADDED_DIM)
                col_id = tl.load(col_ids_ptr + j)
                b_ptrs = tile_ptr + b_offsets
                x = exponents(
                    a, a_ptrs, b_ptrs, num_chunks, scale, PADDED_DIM == CHUNK, PRECISION, RUNNING
                )
                positive = row_id[:, None] == col_id[None, :]
                h = derivatives(
                    x,
                    row_weights,
                    col_weights_ptr,
                    j,
                    padded_cols,
                    positive,
                    RUNNING,
                    OUT,
                    DENOMINATOR,
                    ROWS_ANCHOR,
                    COLS_ANCHOR,
                )
                if part == 1:
                    h = tl.where(j[None, :] != (own_offset + i)[:, None], h, 0.0)
                b = tl.load(tile_ptr + kept_offsets)
                if PRECISION == "tf32":
                    h = rounded_to_tf32(h)
                gradient = dot(rounded(h, b.dtype), b, gradient, PRECISION)

        out = slices_ptr + (run - before // share) * padded_rows * PADDED_DIM
        out += i.to(tl.int64)[:, None] * PADDED_DIM + kept[None, :]
        tl.store(out, gradient)


# Blocks of rows, which lie in the L2 cache while all columns go by.
GROUP = tl.constexpr(32)


@triton.jit
def _derivatives_kernel(
    rows_ptr,  # (padded rows, padded_dim), and their classes
    cols_ptr,  # (padded cols, padded_dim), and their classes
    row_weights_ptr,  # (4, padded rows) from the weights kernel
    col_weights_ptr,  # (4, padded cols), if COLS_ANCHOR
    temperature_ptr,
    derivatives_ptr,  # out: (rows of the block, columns of the block), of the features' dtype
    padded_rows,
    padded_cols,
    first_row,  # of the block
    first_col,
    padded_width,  # columns of the block
    own_offset,  # the column that is row 0 itself, or far below 0
    padded_dim,
    host_temperature,
    on_device,  # whether the temperature is read there
    either,  # whether it decides which of two kernels returns at once: this, or that with other RUNNING
    RUNNING: tl.constexpr,
    OUT: tl.constexpr,
    DENOMINATOR: tl.constexpr,
    COLS_ANCHOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program owns one tile of a block of H, whose products with the features are made elsewhere.

    Tiles are done by GROUP blocks of rows at a time, so that the programs at work share what they read.
    """
    tau = temperature_of(host_temperature, temperature_ptr, on_device)
    if (either != 0) & (fits(tau) == RUNNING):
        return
    d = tl.arange(0, CHUNK)
    num_tiles = padded_width // COLS
    group = tl.program_id(0) // (GROUP * num_tiles) * GROUP
    height = tl.minimum(tl.num_programs(0) // num_tiles - group, GROUP)
    place = tl.program_id(0) % (GROUP * num_tiles)
    i = first_row + (group + place % height) * ROWS + tl.arange(0, ROWS)
    j = first_col + place // height * COLS + tl.arange(0, COLS)
    row_id = tl.load(classes_of(rows_ptr, padded_rows, padded_dim) + i)
    col_id = tl.load(classes_of(cols_ptr, padded_cols, padded_dim) + j)
    a_ptrs = rows_ptr + i.to(tl.int64)[:, None] * padded_dim + d[None, :]
    b_ptrs = cols_ptr + j.to(tl.int64)[:, None] * padded_dim + d[None, :]
    num_chunks, scale = padded_dim // CHUNK, 1.0 / (tau * LN2)
    x = exponents(None, a_ptrs, b_ptrs, num_chunks, scale, False, PRECISION, RUNNING)
    USES_LSE: tl.constexpr = RUNNING or DENOMINATOR == "one_positive"
    row_weights = weights_of(row_weights_ptr, i, padded_rows.to(tl.int64), 1, USES_LSE)
    positive = row_id[:, None] == col_id[None, :]
    h = derivatives(
        x,
        row_weights,
        col_weights_ptr,
        j,
        padded_cols.to(tl.int64),
        positive,
        RUNNING,
        OUT,
        DENOMINATOR,
        True,
        COLS_ANCHOR,
    )
    h = tl.where(j[None, :] != (own_offset + i)[:, None], h, 0.0)
    if PRECISION == "tf32":
        h = rounded_to_tf32(h)
    at = (i - first_row).to(tl.int64)[:, None] * padded_width + (j - first_col)[None, :]
    tl.store(derivatives_ptr + at, rounded(h, derivatives_ptr.dtype.element_ty))
