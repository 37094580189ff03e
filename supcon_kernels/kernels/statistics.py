"""A few numbers for each anchor: its loss, what the backward needs of it, and what it weighs there."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, import-not-found"

import triton
import triton.language as tl

from supcon_kernels.kernels.rows import fold_of
from supcon_kernels.kernels.tiles import LN2, fits, log_sum, merged, pieces_of, temperature_of


@triton.jit
def poison_of(valid_ptr, padded_rows, WIDTH: tl.constexpr):
    """(WIDTH,) numbers whose sum is 0, or NaN where a row that takes part is not finite."""
    poison = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, padded_rows, WIDTH):
        i = start + tl.arange(0, WIDTH)
        poison += tl.load(valid_ptr + i, mask=i < padded_rows, other=0.0) * 0.0
    return poison


@triton.jit
def count_as_ended(num_ended_ptr):
    """Counts this program as ended; whether all others are, so that what they wrote can be read."""
    tl.debug_barrier()  # what other threads wrote goes before the count of the one that counts
    num_before = tl.atomic_add(num_ended_ptr, 1, sem="acq_rel", scope="gpu")
    return num_before == tl.num_programs(0) - 1


@triton.jit
def added(partials_ptr, num_partials):
    """Their sum, in an order that depends on nothing but their number."""
    WIDTH: tl.constexpr = 32  # a warp's
    total = tl.zeros((WIDTH,), tl.float64)
    for start in range(0, num_partials, WIDTH):
        k = start + tl.arange(0, WIDTH)
        # Past the L1 cache, which knows nothing of other multiprocessors' writes.
        total += tl.load(partials_ptr + k, mask=k < num_partials, other=0.0, cache_modifier=".cg")
    return tl.sum(total, axis=0)


@triton.jit
def _loss_kernel(
    sums_ptr,  # (pieces, 4, padded rows) from the forward kernel
    second_sums_ptr,  # the same of its second look, if ONE_POSITIVE
    valid_ptr,  # (padded rows,)
    col_valid_ptr,  # (padded cols,)
    num_positives_ptr,  # (padded rows + 1,) int32, behind the rows how many programs have ended: 0
    partials_ptr,  # (2, programs) float64: what each adds to the loss and to its count
    loss_ptr,  # out: float32, (num_rows,) where the reduction is "none", else one
    count_ptr,  # out: what the sum of the losses was divided by
    stats_ptr,  # out: (5, num_rows), see the backend
    num_rows,
    padded_rows,
    padded_cols,  # 0 where the columns are the rows
    num_tiles,  # shares of the forward kernel
    group,
    share,
    max_pieces,
    OUT: tl.constexpr,
    DENOMINATOR: tl.constexpr,
    REDUCTION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """A program owns BLOCK_ROWS anchors; the last to end adds up what all of them have."""
    # Every program looks at all rows: one that is not finite makes the loss of every anchor NaN.
    poison = poison_of(valid_ptr, padded_rows, 8 * BLOCK_ROWS)
    poison = tl.sum(poison + poison_of(col_valid_ptr, padded_cols, 8 * BLOCK_ROWS), axis=0)
    step = padded_rows.to(tl.int64)
    program = tl.program_id(0)
    i = program * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask = i < num_rows
    taken = tl.load(valid_ptr + i, mask=mask, other=0.0) != 0.0
    num_positives = tl.load(num_positives_ptr + i, mask=mask, other=0)
    num_pieces = pieces_of(i // ROWS, num_tiles, group, share)
    total, largest = merged(sums_ptr, i, mask, step, num_pieces, max_pieces)
    contributes = num_positives > 0
    if DENOMINATOR == "only_negatives":
        contributes = contributes & (total > 0.0)
    num_positives = tl.where(contributes, num_positives, 1).to(tl.float32)
    total = tl.where(contributes, total, 1.0)

    softmax_weight = tl.full((BLOCK_ROWS,), 1.0, tl.float32)
    if DENOMINATOR == "one_positive":
        rest, _ = merged(second_sums_ptr, i, mask, step, num_pieces, max_pieces)
        pos_sums_ptr = second_sums_ptr
    else:
        rest = total
        pos_sums_ptr = sums_ptr
    of_positives, pos_largest = merged(
        pos_sums_ptr + 2 * step, i, mask, step, num_pieces, max_pieces
    )
    if OUT:
        normaliser = num_positives
        loss = -of_positives / num_positives
    else:
        normaliser = tl.where(contributes, of_positives, 1.0)
        loss = tl.log2(num_positives) - log_sum(normaliser, pos_largest)
    if DENOMINATOR == "one_positive":
        softmax_weight = rest / normaliser
    else:
        loss += log_sum(total, largest)
    if OUT and DENOMINATOR == "all":  # all hold what positives hold: below 0 it is roundings
        loss = tl.where(loss < 0.0, 0.0, loss)

    loss = tl.where(contributes, loss * LN2, 0.0) + poison
    loss = tl.where(taken, loss, 0.0)
    if REDUCTION == "none":
        tl.store(loss_ptr + i, loss, mask=mask)

    stride = num_rows.to(tl.int64)
    tl.store(stats_ptr + i, total, mask=mask)
    normaliser = tl.where(contributes, normaliser, float("inf"))
    tl.store(stats_ptr + stride + i, normaliser, mask=mask)
    tl.store(stats_ptr + 2 * stride + i, softmax_weight, mask=mask)
    tl.store(stats_ptr + 3 * stride + i, largest, mask=mask)
    tl.store(stats_ptr + 4 * stride + i, pos_largest, mask=mask)

    counted = contributes if REDUCTION == "positive_mean" else taken
    num_programs = tl.num_programs(0)
    tl.store(partials_ptr + program, tl.sum(loss.to(tl.float64), axis=0))
    num_counted = tl.sum(counted.to(tl.int32), axis=0)
    tl.store(partials_ptr + num_programs + program, num_counted.to(tl.float64))
    if count_as_ended(num_positives_ptr + padded_rows):
        count = 1.0
        if REDUCTION == "mean" or REDUCTION == "positive_mean":
            count = tl.maximum(added(partials_ptr + num_programs, num_programs), 1.0)
        tl.store(count_ptr, count)
        if REDUCTION != "none":
            total_loss = added(partials_ptr, num_programs)
            tl.store(loss_ptr, (total_loss / count).to(tl.float32))


@triton.jit
def _weights_kernel(
    upstream_ptr,  # (num_rows,) or one: the gradient of each anchor's loss, or of their sum over count
    peak_ptr,  # of the upstream gradients of all anchors, of either sign
    count_ptr,
    stats_ptr,  # (5, num_rows)
    temperature_ptr,
    weights_ptr,  # out: (4, padded rows) weight and log₂ of what it is divided by, for the softmax;
    # the same for the pull of positives; of "one_positive" the sum itself where powers fit
    factor_ptr,  # out: what was taken out of all weights
    num_rows,
    padded_rows,
    upstream_stride,
    headroom,  # keeps 16-bit operands from being subnormal
    host_temperature,
    on_device,
    NORMALIZE: tl.constexpr,
    OUT: tl.constexpr,
    DENOMINATOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """A program owns BLOCK_ROWS anchors; those that do not contribute weigh nothing."""
    step = padded_rows.to(tl.int64)
    stride = num_rows.to(tl.int64)
    tau = temperature_of(host_temperature, temperature_ptr, on_device)
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask = i < num_rows
    normaliser = tl.load(stats_ptr + stride + i, mask=mask, other=float("inf"))
    mask = mask & (normaliser != float("inf"))
    total = tl.load(stats_ptr + i, mask=mask, other=1.0)
    softmax_weight = tl.load(stats_ptr + 2 * stride + i, mask=mask, other=0.0)
    largest = tl.load(stats_ptr + 3 * stride + i, mask=mask, other=0.0)
    pos_largest = tl.load(stats_ptr + 4 * stride + i, mask=mask, other=0.0)
    upstream = tl.load(upstream_ptr + i.to(tl.int64) * upstream_stride, mask=mask, other=0.0)
    peak = tl.abs(tl.load(peak_ptr).to(tl.float32))
    upstream = upstream.to(tl.float32) / tl.where(peak == 0.0, 1.0, peak)
    upstream = tl.where(mask, upstream * headroom, 0.0)

    # Where powers fit they are not shifted; elsewhere the logarithm is, and rounded to float32:
    # what that takes off it, the weight puts back.
    fast = fits(tau) & NORMALIZE
    lse = log_sum(total, largest)
    shift = tl.where(fast, 0.0, lse) - largest
    weight = upstream * softmax_weight * tl.exp2(shift) / total
    weight = tl.where(softmax_weight == 0.0, 0.0, weight)
    pull_lse = tl.zeros((BLOCK_ROWS,), tl.float32)
    if OUT:
        pull = upstream / normaliser
    else:
        normaliser = tl.where(mask, normaliser, 1.0)
        pull_lse = log_sum(normaliser, pos_largest)
        shift = pull_lse - pos_largest
        if DENOMINATOR != "one_positive":
            shift = tl.where(fast, -pos_largest, shift)
        pull = upstream * tl.exp2(shift) / normaliser
    if DENOMINATOR == "one_positive":  # 1 - q is the negatives' sum over itself and the power
        pull *= tl.where(fast, total, 1.0)
        lse = tl.where(fast, total, lse)
    tl.store(weights_ptr + i, weight)
    tl.store(weights_ptr + step + i, lse)
    tl.store(weights_ptr + 2 * step + i, pull)
    tl.store(weights_ptr + 3 * step + i, pull_lse)
    if tl.program_id(0) == 0:
        count = tl.load(count_ptr).to(tl.float32)
        tl.store(factor_ptr, peak / (headroom * fold_of(tau, NORMALIZE) * tau * count))
