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
def added_along(x, AXIS: tl.constexpr):
    """Sums along AXIS; along rows (ROWS, 8), of every eighth column: of what one thread holds of a row."""
    if AXIS == 1:
        x = tl.reshape(x, (x.shape[0], x.shape[1] // 8, 8))
    return tl.sum(x, axis=AXIS)


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
def add_pairs(
    sums,  # of the anchors: total and largest of the denominator, then of the positives
    negatives,  # of the anchors: the sum of their negatives, or its log₂ if RUNNING, for "one_positive"
    x,  # exponents (ROWS, COLS)
    valid,  # 1, or 0 where a contrast takes no part
    positive,  # (ROWS, COLS) where a pair is of one class
    other,  # (ROWS, COLS) where a contrast is not the anchor itself
    AXIS: tl.constexpr,  # along which contrasts lie: 1 where the rows are the anchors
    HAS_OWN: tl.constexpr,  # whether there is a pair that is no ``other``
    RUNNING: tl.constexpr,
    OUT: tl.constexpr,
    DENOMINATOR: tl.constexpr,
):
    """Add a tile's pairs to what its anchors have."""
    total, largest, pos_total, pos_largest = sums
    if DENOMINATOR == "one_positive" and RUNNING:
        log_q, not_q = against_log_sum(x, tl.expand_dims(negatives, AXIS))
        if OUT:
            total += tl.sum(tl.where(positive, not_q, 0.0), axis=AXIS)
            pos_total += tl.sum(tl.where(positive, log_q, 0.0), axis=AXIS)
        else:
            log_q = tl.where(positive, log_q, float("-inf"))
            total, pos_total, largest = add_probabilities(
                log_q, not_q, total, pos_total, largest, AXIS
            )
            pos_largest = largest
    elif RUNNING:
        counts = tl.expand_dims(valid != 0.0, 1 - AXIS)
        if HAS_OWN:
            counts = counts & other
        if OUT:
            pos_total += tl.sum(tl.where(positive, x, 0.0), axis=AXIS)
        else:
            of_positives = tl.where(positive, x, float("-inf"))
            pos_total, pos_largest = add_powers(of_positives, pos_total, pos_largest, AXIS)
        if DENOMINATOR != "all":
            counts = counts & (positive == 0)
        total, largest = add_powers(tl.where(counts, x, float("-inf")), total, largest, AXIS)
    else:
        power = tl.exp2(x)
        if HAS_OWN:
            power = tl.where(other, power, 0.0)
        of_positives = x if OUT else power
        if DENOMINATOR == "one_positive":
            of_positives, power = against_sum(power, tl.expand_dims(negatives, AXIS), OUT)
            power = tl.where(positive, power, 0.0)
        elif DENOMINATOR == "only_negatives":
            power = tl.where(positive, 0.0, power)
        pos_total += added_along(tl.where(positive, of_positives, 0.0), AXIS)
        if DENOMINATOR != "one_positive":
            power = power * tl.expand_dims(valid, 1 - AXIS)
        total += added_along(power, AXIS)
    return total, largest, pos_total, pos_largest


@triton.jit
def load_sums(sums_ptrs, step, RUNNING: tl.constexpr, OUT: tl.constexpr):
    """What columns have: total and largest of the denominator, then of the positives."""
    total = tl.load(sums_ptrs)
    pos_total = tl.load(sums_ptrs + 2 * step)
    largest = tl.zeros_like(total)
    pos_largest = largest
    if RUNNING:
        largest = tl.load(sums_ptrs + step)
        if not OUT:
            pos_largest = tl.load(sums_ptrs + 3 * step)
    return total, largest, pos_total, pos_largest


@triton.jit
def store_sums(sums_ptrs, step, sums):
    """As they are loaded."""
    for k in tl.static_range(4):
        tl.store(sums_ptrs + k * step, sums[k])


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
        negatives = row_id
        if SECOND:
            num_pieces = pieces_of(block, num_tiles, group, share)
            negatives, largest = merged(
                first_sums_ptr, i, i >= 0, padded_rows, num_pieces, max_pieces
            )
            if RUNNING:
                negatives = log_sum(negatives, largest)
        # Without a maximum each thread has sums of its own: adding along rows comes last.
        total = tl.zeros((ROWS,) if RUNNING else (ROWS, 8), tl.float32)
        largest = tl.full((ROWS,), LOWEST if RUNNING else 0.0, tl.float32)
        sums = total, largest, total, tl.zeros((ROWS,), tl.float32) if OUT else largest

        # The tiles before those that hold a row itself, those, and the tiles after them.
        for part in tl.static_range(3):
            for tile in range(parts[part], parts[part + 1]):
                j = tile * COLS + k
                col_id = tl.load(col_ids_ptr + j)
                valid = tl.load(col_valid_ptr + j)
                b_ptrs = cols_ptr + tl.cast(tile, tl.int64) * (COLS * padded_dim) + b_offsets
                x = exponents(a, a_ptrs, b_ptrs, num_chunks, scale, ONE_CHUNK, PRECISION, RUNNING)
                positive = row_id[:, None] == col_id[None, :]
                other = j[None, :] != (own_offset + i)[:, None]
                if part == 1:
                    positive = positive & other
                if BOTH:
                    col_sums = load_sums(slot_ptr + j, padded_cols, RUNNING, OUT)
                    col_negatives = j
                    if SECOND:
                        col_negatives = tl.load(first_col_sums_ptr + j)
                        if RUNNING:
                            col_largest = tl.load(first_col_sums_ptr + padded_cols + j)
                            col_negatives = log_sum(col_negatives, col_largest)
                    col_sums = add_pairs(
                        col_sums,
                        col_negatives,
                        x,
                        row_valid,
                        positive,
                        other,
                        0,
                        False,
                        RUNNING,
                        OUT,
                        DENOMINATOR,
                    )
                    store_sums(slot_ptr + j, padded_cols, col_sums)
                sums = add_pairs(
                    sums,
                    negatives,
                    x,
                    valid,
                    positive,
                    other,
                    1,
                    part == 1,
                    RUNNING,
                    OUT,
                    DENOMINATOR,
                )

        total, largest, pos_total, pos_largest = sums
        if not RUNNING:
            total = tl.sum(total, axis=1)
            pos_total = tl.sum(pos_total, axis=1)
        out = sums_ptr + (run - before // share) * 4 * padded_rows + i
        store_sums(out, padded_rows, (total, largest, pos_total, pos_largest))
        if BOTH:
            tl.debug_barrier()  # what a thread stored of the columns another may load
