"""A side of the call as the pair kernels take it, and the way back to the gradient of its features."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped, import-not-found"

import triton
import triton.language as tl

from supcon_kernels.kernels.tiles import (
    INTERPRETED,
    LN2,
    classes_of,
    fits,
    pieces_of,
    rounded,
    rounded_to_tf32,
    temperature_of,
)

# Class of a row that takes no part. That of a row without an equal on the other side is -1.
ABSENT = tl.constexpr(-2)


@triton.jit
def normalized(x):
    """Unit rows of ``x`` (rows, features); (rows,) powers of two, and (rows,) norms of x times these.

    The powers keep squares from over- and underflow. A row of zeros stays so, and its norm is 0.
    """
    exponent = tl.max(tl.abs(x), axis=1).to(tl.int32, bitcast=True) & 0x7F800000
    power = tl.maximum(0x7F000000 - exponent, 0x00800000).to(tl.float32, bitcast=True)
    scaled = x * power[:, None]
    norm = tl.sqrt_rn(tl.sum(scaled * scaled, axis=1))
    divisor = tl.where(norm == 0.0, 1.0, norm)
    return tl.div_rn(scaled, tl.broadcast_to(divisor[:, None], x.shape)), power, norm


@triton.jit
def fold_of(temperature, NORMALIZE: tl.constexpr):
    """What prepared rows are multiplied by, so that their products are exponents where these fit."""
    fold = 1.0
    if NORMALIZE:
        fold = tl.where(fits(temperature), tl.sqrt_rn(1.0 / (temperature * LN2)), 1.0)
    return fold


@triton.jit
def features_of(features_ptr, i, d, taken, num_samples, dim, sample_stride, view_stride):
    """Rows ``i`` of features (views, samples, dim) in float32, zero where not ``taken``."""
    offsets = (i % num_samples).to(tl.int64) * sample_stride
    offsets += (i // num_samples).to(tl.int64) * view_stride
    mask = taken[:, None] & (d[None, :] < dim)
    at = features_ptr + offsets[:, None] + d[None, :]
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def counted(labels, others, j, last, count):
    """``last`` becomes ``j`` where labels are equal, and ``count`` one more.

    Without a choice of instructions the compiler selects, and selections run at half the rate of
    float32 operations, as comparisons do. So ``j`` is 0 · last + j on its bits, which are a tiny
    float32 and stay what they are, and the count is a float32.
    """
    if INTERPRETED:
        equal = labels == others
        return tl.where(equal, j, last), count + equal.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            """{
                .reg .pred equal;
                setp.eq.s64 equal, $2, $3;
                mov.b32 $0, $5;
                mov.b32 $1, $6;
                @equal fma.rn.f32 $0, $0, 0f00000000, $4;
                @equal add.f32 $1, $1, 0f3f800000;
            }""",
            "=&r,=&f,l,l,r,r,f",
            [labels, others, j, last, count],
            dtype=(tl.int32, tl.float32),
            is_pure=True,
            pack=1,
        )


@triton.jit
def equal_labels(
    labels, others_ptr, num_others, nobody, BLOCK_ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """For each label the last of ``others`` that equals it, -1 where none does, and how many do.

    What it says of a label that is ``nobody`` has no meaning.
    """
    j = tl.arange(0, WIDTH)
    last = tl.zeros((BLOCK_ROWS, WIDTH), tl.int32)  # counted from 1
    count = tl.zeros((BLOCK_ROWS, WIDTH), tl.float32)
    others = tl.load(others_ptr + j, mask=j < num_others, other=nobody)
    for start in range(0, num_others, WIDTH):
        # On their way while those before are compared.
        following_ptr = others_ptr + start + WIDTH
        is_there = j < num_others - start - WIDTH
        following = tl.load(following_ptr + j, mask=is_there, other=nobody)
        at = start + 1 + j
        last, count = counted(labels[:, None], others[None, :], at[None, :], last, count)
        others = following
    return tl.max(last, axis=1) - 1, tl.sum(count.to(tl.int32), axis=1)


@triton.jit
def _prepare_kernel(
    features_ptr,  # (views, samples, dim)
    labels_ptr,  # (samples,) int64
    anchor_labels_ptr,  # (anchor samples,)
    contrast_labels_ptr,  # (contrast samples,)
    sorted_begin_ptr,  # (samples,) int32 where the label's class begins among the sorted contrasts, if is_sorted
    sorted_end_ptr,
    temperature_ptr,
    rows_ptr,  # out: (padded rows, padded_dim), and the classes, ABSENT for what takes no part
    valid_ptr,  # out: (padded rows,) float32: 1, 0 for what takes no part, NaN for what is not finite
    num_positives_ptr,  # out: (padded rows + 1,) int32, if has_anchors: and a 0 behind them
    padded_rows,
    num_rows,
    num_samples,
    num_anchors,  # samples
    num_contrasts,  # samples
    num_contrast_views,
    own_offset,  # the contrast that is row 0 itself, or far below 0
    dim,
    sample_stride,
    view_stride,
    ignore_index,
    padded_dim,
    host_temperature,
    on_device,  # whether the temperature is read there
    has_anchors,
    is_square,  # whether the anchors are also what each anchor counts its positives among
    is_sorted,
    NORMALIZE: tl.constexpr,
    TF32: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # labels that are compared with the rows' at a time
):
    """A program owns BLOCK_ROWS rows; ignored ones and padding become zeros."""
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_DIM)
    labels = tl.load(labels_ptr + i % num_samples, mask=i < num_rows, other=ignore_index)
    taken = (i < num_rows) & (labels != ignore_index)
    x = features_of(features_ptr, i, d, taken, num_samples, dim, sample_stride, view_stride)
    tl.store(valid_ptr + i, taken.to(tl.float32) + tl.sum(x * 0.0, axis=1))
    if NORMALIZE:
        x, _, _ = normalized(x)
    x *= fold_of(temperature_of(host_temperature, temperature_ptr, on_device), NORMALIZE)
    if TF32:  # as the tensor cores see it, for all of the loss
        x = rounded_to_tf32(x)
    at = rows_ptr + i.to(tl.int64)[:, None] * padded_dim + d[None, :]
    tl.store(at, rounded(x, rows_ptr.dtype.element_ty), mask=d[None, :] < padded_dim)

    if is_sorted:
        begin = tl.load(sorted_begin_ptr + i % num_samples, mask=taken, other=0)
        count = tl.load(sorted_end_ptr + i % num_samples, mask=taken, other=0) - begin
        ids = tl.where((count > 0) | (is_square != 0), begin, -1)
    else:
        ids, count = equal_labels(
            labels, anchor_labels_ptr, num_anchors, ignore_index, BLOCK_ROWS, WIDTH
        )
        if (has_anchors != 0) & (is_square == 0):
            _unused, count = equal_labels(
                labels, contrast_labels_ptr, num_contrasts, ignore_index, BLOCK_ROWS, WIDTH
            )
    ids_ptr = classes_of(rows_ptr, padded_rows, padded_dim)
    tl.store(ids_ptr + i, tl.where(taken, ids, ABSENT))
    if has_anchors:
        own = own_offset + i
        own_labels = tl.load(
            contrast_labels_ptr + own % tl.maximum(num_contrasts, 1),
            mask=taken & (own >= 0),
            other=ignore_index,
        )
        count = count * num_contrast_views - (own_labels == labels).to(tl.int32)
        tl.store(num_positives_ptr + i, tl.where(taken, count, 0))
        if tl.program_id(0) == 0:
            tl.store(num_positives_ptr + padded_rows, 0)


@triton.jit
def _gradient_kernel(
    slices_ptr,  # (pieces, padded rows, padded_dim) whose sum, times factor, is the rows' gradient
    features_ptr,  # (views, samples, dim)
    rows_ptr,  # (padded rows, padded_dim) as prepared, and the classes
    factor_ptr,  # float32
    gradient_ptr,  # out: (views, samples, dim), of the features
    dots_ptr,  # out: (padded rows,) prepared row · gradient of the unit row, if DOTS
    num_rows,
    num_samples,
    dim,
    sample_stride,
    view_stride,
    gradient_sample_stride,
    gradient_view_stride,
    padded_rows,
    num_tiles,  # shares of the backward kernel
    group,
    share,
    padded_dim,
    NORMALIZE: tl.constexpr,
    DOTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """A program owns BLOCK_ROWS rows: adds their pieces in order, and goes back through the norm."""
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_DIM)
    inside = d[None, :] < padded_dim
    at = i.to(tl.int64)[:, None] * padded_dim + d[None, :]
    g = tl.zeros((BLOCK_ROWS, BLOCK_DIM), tl.float32)
    block = tl.program_id(0) * BLOCK_ROWS // ROWS
    for piece in range(pieces_of(block, num_tiles, group, share)):
        slice_ptr = slices_ptr + piece * padded_rows.to(tl.int64) * padded_dim
        g += tl.load(slice_ptr + at, mask=inside, other=0.0)
    g *= tl.load(factor_ptr)

    ids_ptr = classes_of(rows_ptr, padded_rows, padded_dim)
    taken = (i < num_rows) & (tl.load(ids_ptr + i) != ABSENT)
    if DOTS:
        row = tl.load(rows_ptr + at, mask=inside, other=0.0).to(tl.float64)
        dots = tl.sum(row * g.to(tl.float64), axis=1)
        tl.store(dots_ptr + i, tl.where(taken, dots, 0.0))
    if NORMALIZE:
        x = features_of(features_ptr, i, d, taken, num_samples, dim, sample_stride, view_stride)
        unit, power, norm = normalized(x)
        g -= unit * tl.sum(unit * g, axis=1)[:, None]
        g = tl.div_rn(g, tl.broadcast_to(norm[:, None], g.shape)) * power[:, None]
        taken = taken & (norm != 0.0)
    g = tl.where(taken[:, None], g, 0.0)
    target = (i % num_samples).to(tl.int64) * gradient_sample_stride
    target += (i // num_samples).to(tl.int64) * gradient_view_stride
    mask = (i < num_rows)[:, None] & (d[None, :] < dim)
    g = rounded(g, gradient_ptr.dtype.element_ty)
    tl.store(gradient_ptr + target[:, None] + d[None, :], g, mask=mask)


@triton.jit
def _temperature_kernel(
    dots_ptr,  # (padded rows,) float64
    temperature_ptr,
    temperature_gradient_ptr,  # out
    padded_rows,
    part,  # of the pairs that a row sees, those that count: half where every pair is seen from both sides
    host_temperature,
    on_device,
    NORMALIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """One program adds up what all rows give to the gradient of the temperature."""
    tau = temperature_of(host_temperature, temperature_ptr, on_device)
    total = tl.zeros((BLOCK_ROWS,), tl.float64)
    for start in range(0, padded_rows, BLOCK_ROWS):
        total += tl.load(dots_ptr + start + tl.arange(0, BLOCK_ROWS))
    scale = -part / (tau * fold_of(tau, NORMALIZE))
    tl.store(temperature_gradient_ptr, (tl.sum(total, axis=0) * scale).to(tl.float32))
