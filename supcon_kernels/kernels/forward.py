"""The forward over pairs: each anchor's sum of powers, and what its positives add up to."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, import-not-found"

import triton
import triton.language as tl

from supcon_kernels.kernels.tiles import (
    LN2,
    LOWEST,
    classes_of,
    exponents,
    fits,
    log_sum,
    logarithm,
    merged,
    parts_of,
    pieces_of,
    reciprocal,
    run_of,
    sigmoid,
    temperature_of,
)


@triton.jit
def add_powers(x, total, largest, AXIS: tl.constexpr):
    """Add Σ 2^x along AXIS to total · 2^largest, of which the new largest is the maximum."""
    new = tl.maximum(largest, tl.max(x, axis=AXIS))
    powers = tl.exp2(x - tl.expand_dims(new, AXIS))
    return total * tl.exp2(largest - new) + tl.sum(powers, axis=AXIS), new


@triton.jit
def add_places(x):
    """Sums (ROWS, 8) over every eighth column: of what one thread holds of a row, no other's."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 8, 8)), axis=1)


@triton.jit
def add_probabilities(log_q, not_q, total, pos_total, largest, AXIS: tl.constexpr):
    """Add Σ q (1 - q) and Σ q along AXIS to sums that are both times 2^largest, which is the maximum."""
    new = tl.maximum(largest, tl.max(log_q, axis=AXIS))
    q = tl.exp2(log_q - tl.expand_dims(new, AXIS))
    shrink = tl.exp2(largest - new)
    total = total * shrink + tl.sum(q * not_q, axis=AXIS)
    return total, pos_total * shrink + tl.sum(q, axis=AXIS), new


@triton.jit
def against_sum(power, negatives, OUT: tl.constexpr):
    """log₂ q and 1 - q if OUT, else q and q (1 - q), with q = power / (power + negatives)."""
    inverse = reciprocal(power + negatives)
    q = tl.minimum(power * inverse, 1.0)
    not_q = negatives * inverse
    if OUT:
        return logarithm(q), not_q
    else:
        return q, q * not_q


@triton.jit
def against_log_sum(x, lse):
    """log₂ q and 1 - q, with q = 2^x / (2^x + 2^lse)."""
    distance = x - lse
    t, _, not_q = sigmoid(distance)
    return tl.minimum(distance, 0.0) - logarithm(1.0 + t), not_q


@triton.jit
def add_to_columns(
    sums_ptr,  # (4, padded cols) of this slot, at the tile's columns
    padded_cols,
    x,  # exponents (ROWS, COLS), or their powers unless RUNNING, of the pairs in the denominator
    of_positives,  # what a pair adds to the positives, if it is one
    positive,
    RUNNING: tl.constexpr,
    OUT: tl.constexpr,
):
    """Add a tile to the sums of its columns, as the kernel does to those of its rows."""
    pos_ptr = sums_ptr + 2 * padded_cols
    total = tl.load(sums_ptr)
    pos_total = tl.load(pos_ptr)
    largest = tl.zeros_like(total)
    pos_largest = largest
    if RUNNING:
        total, largest = add_powers(x, total, tl.load(sums_ptr + padded_cols), 0)
    else:
        total += tl.sum(x, axis=0)
    if RUNNING and not OUT:
        of_positives = tl.where(positive, of_positives, float("-inf"))
        before = tl.load(pos_ptr + padded_cols)
        pos_total, pos_largest = add_powers(of_positives, pos_total, before, 0)
    else:
        pos_total += tl.sum(tl.where(positive, of_positives, 0.0), axis=0)
    tl.store(sums_ptr, total)
    tl.store(sums_ptr + padded_cols, largest)
    tl.store(pos_ptr, pos_total)
    tl.store(pos_ptr + padded_cols, pos_largest)


@triton.jit
def add_positives_to_columns(
    sums_ptr,  # (4, padded cols) of this slot, at the tile's columns
    first_sums_ptr,  # (2, padded cols) the negatives' total and largest, at the tile's columns
    padded_cols,
    x,  # exponents (ROWS, COLS)
    positive,
    RUNNING: tl.constexpr,
    OUT: tl.constexpr,
):
    """Add a tile to the sums of its columns in the second look."""
    negatives = tl.load(first_sums_ptr)
    if RUNNING:
        lse = log_sum(negatives, tl.load(first_sums_ptr + padded_cols))
        of_positives, rest = against_log_sum(x, lse[None, :])
    else:
        of_positives, rest = against_sum(tl.exp2(x), negatives[None, :], OUT)
    if RUNNING and not OUT:
        log_q = tl.where(positive, of_positives, float("-inf"))
        largest_ptr = sums_ptr + padded_cols
        pos_ptr = largest_ptr + padded_cols
        total, pos_total, largest = add_probabilities(
            log_q, rest, tl.load(sums_ptr), tl.load(pos_ptr), tl.load(largest_ptr), 0
        )
        tl.store(sums_ptr, total)
        tl.store(largest_ptr, largest)
        tl.store(pos_ptr, pos_total)
        tl.store(pos_ptr + padded_cols, largest)
    else:
        rest = tl.where(positive, rest, 0.0)
        add_to_columns(sums_ptr, padded_cols, rest, of_positives, positive, False, OUT)


@triton.jit
def _forward_kernel(
    rows_ptr,  # (padded rows, padded_dim) anchors, and their classes
    cols_ptr,  # (padded cols, padded_dim) contrasts, and their classes
    col_valid_ptr,  # (padded cols,) 1, or 0 where a column takes no part
    first_sums_ptr,  # the negatives' own sums, for "one_positive"
    temperature_ptr,
    sums_ptr,  # out: (pieces, 4, padded rows) total and largest of the denominator, then of the positives
    padded_rows,
    padded_cols,
    num_blocks,  # of rows
    num_tiles,  # of columns
    group,  # blocks that are cut together
    share,  # tiles of a program
    max_pieces,  # of a block
    own_offset,  # the column that is row 0 itself, or far below 0
    padded_dim,
    host_temperature,
    on_device,  # whether the temperature is read there
    either,  # whether it decides which of two kernels returns at once: this, or that with other RUNNING
    row_valid_ptr,  # (padded rows,) as that of columns, if BOTH
    col_sums_ptr,  # (slots, 4, padded cols) as the rows', if BOTH: sums of nothing, which are added to
    first_col_sums_ptr,  # (2, padded cols) the first look's total and largest, if BOTH and it is the second
    RUNNING: tl.constexpr,
    OUT: tl.constexpr,
    DENOMINATOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHUNK: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    BOTH: tl.constexpr,  # the columns are anchors, too
):
    """A program owns ``share`` tiles, of one block of rows after the other; it keeps their sums.

    Those of columns, if BOTH, wait in memory from one block of rows to the next. There is a slot for
    each program or, where these are fewer, for each block, whose tiles are each one program's.

    "one_positive" is a second look, once the negatives' sum is known: each positive stands against it
    alone, with q its probability: Σ log₂ q and Σ (1 - q) if OUT, else Σ q and Σ q (1 - q).
    """
    SECOND: tl.constexpr = DENOMINATOR == "one_positive"
    tau = temperature_of(host_temperature, temperature_ptr, on_device)
    if (either != 0) & (fits(tau) == RUNNING):
        return
    scale = 1.0 / (tau * LN2)
    if ONE_CHUNK:
        padded_dim = CHUNK
    num_chunks = padded_dim // CHUNK
    row_ids_ptr = classes_of(rows_ptr, padded_rows, padded_dim)
    col_ids_ptr = classes_of(cols_ptr, padded_cols, padded_dim)
    padded_rows = padded_rows.to(tl.int64)
    padded_cols = padded_cols.to(tl.int64)
    k = tl.arange(0, COLS)
    d = tl.arange(0, CHUNK)
    b_offsets = k[:, None] * padded_dim + d[None, :]
    run, start, first, last = run_of(num_blocks, num_tiles, group, share)
    for block in range(first // num_tiles, tl.cdiv(last, num_tiles)):
        before = block * num_tiles
        own = own_offset + (start + block) * ROWS
        parts = parts_of(first - before, last - before, num_tiles, own, ROWS, COLS)
        i = (start + block) * ROWS + tl.arange(0, ROWS)
        a_ptrs = rows_ptr + i.to(tl.int64)[:, None] * padded_dim + d[None, :]
        a = tl.load(a_ptrs)
        row_id = tl.load(row_ids_ptr + i)
        if BOTH:
            row_valid = tl.load(row_valid_ptr + i)
            slot = tl.program_id(0)
            if num_blocks < tl.num_programs(0):
                slot = start + block
            slot_ptr = col_sums_ptr + slot * 4 * padded_cols
        if SECOND:
            num_pieces = pieces_of(block, num_tiles, group, share)
            negatives, largest = merged(
                first_sums_ptr, i, i >= 0, padded_rows, num_pieces, max_pieces
            )
            lse = log_sum(negatives, largest)
        # Without a maximum each thread has sums of its own: adding along rows comes last.
        total = tl.zeros((ROWS, 8), tl.float32)
        if RUNNING:
            total = tl.zeros((ROWS,), tl.float32)
        pos_total = total
        largest = tl.full((ROWS,), LOWEST if RUNNING else 0.0, tl.float32)
        pos_largest = tl.zeros((ROWS,), tl.float32) if OUT else largest

        # The tiles before those that hold a row itself, those, and the tiles after them.
        for part in tl.static_range(3):
            for tile in range(parts[part], parts[part + 1]):
                j = tile * COLS + k
                col_id = tl.load(col_ids_ptr + j)
                valid = tl.load(col_valid_ptr + j)
                b_ptrs = cols_ptr + tl.cast(tile, tl.int64) * (COLS * padded_dim) + b_offsets
                x = exponents(
                    a,
                    a_ptrs,
                    b_ptrs,
                    num_chunks,
                    scale,
                    ROWS,
                    COLS,
                    CHUNK,
                    ONE_CHUNK,
                    PRECISION,
                    RUNNING,
                )
                positive = row_id[:, None] == col_id[None, :]
                if part == 1:
                    other = j[None, :] != (own_offset + i)[:, None]
                    positive = positive & other
                if SECOND and BOTH:
                    add_positives_to_columns(
                        slot_ptr + j, first_col_sums_ptr + j, padded_cols, x, positive, RUNNING, OUT
                    )
                if SECOND and RUNNING:
                    log_q, not_q = against_log_sum(x, lse[:, None])
                    if OUT:
                        total += tl.sum(tl.where(positive, not_q, 0.0), axis=1)
                        pos_total += tl.sum(tl.where(positive, log_q, 0.0), axis=1)
                    else:
                        log_q = tl.where(positive, log_q, float("-inf"))
                        total, pos_total, largest = add_probabilities(
                            log_q, not_q, total, pos_total, largest, 1
                        )
                        pos_largest = largest
                elif RUNNING:
                    counts = (valid != 0.0)[None, :]
                    if part == 1:
                        counts = counts & other
                    if OUT:
                        pos_total += tl.sum(tl.where(positive, x, 0.0), axis=1)
                    else:
                        of_positives = tl.where(positive, x, float("-inf"))
                        pos_total, pos_largest = add_powers(of_positives, pos_total, pos_largest, 1)
                    if DENOMINATOR != "all":
                        counts = counts & (positive == 0)
                    total, largest = add_powers(
                        tl.where(counts, x, float("-inf")), total, largest, 1
                    )
                    if BOTH:
                        counts = (row_valid != 0.0)[:, None] & (positive == 0)
                        if DENOMINATOR == "all":
                            counts = (row_valid != 0.0)[:, None]
                        of_col = tl.where(counts, x, float("-inf"))
                        add_to_columns(slot_ptr + j, padded_cols, of_col, x, positive, RUNNING, OUT)
                else:
                    power = tl.exp2(x)
                    if part == 1:
                        power = tl.where(other, power, 0.0)
                    of_positives = x if OUT else power
                    if SECOND:
                        of_positives, rest = against_sum(power, negatives[:, None], OUT)
                        power = tl.where(positive, rest, 0.0)
                    elif DENOMINATOR != "all":
                        power = tl.where(positive, 0.0, power)
                    pos_total += add_places(tl.where(positive, of_positives, 0.0))
                    total += add_places(power if SECOND else power * valid[None, :])
                    if BOTH and not SECOND:
                        of_col = power * row_valid[:, None]
                        add_to_columns(
                            slot_ptr + j, padded_cols, of_col, of_positives, positive, RUNNING, OUT
                        )

        if not RUNNING:
            total = tl.sum(total, axis=1)
            pos_total = tl.sum(pos_total, axis=1)
        out = sums_ptr + (run - before // share) * 4 * padded_rows + i
        tl.store(out, total)
        tl.store(out + padded_rows, largest)
        tl.store(out + 2 * padded_rows, pos_total)
        tl.store(out + 3 * padded_rows, pos_largest)
        if BOTH:
            tl.debug_barrier()  # what a thread stored of the columns another may load
