"""Triton kernels on CUDA tensors: float32, float16 and bfloat16, any variant, no mask.

This file says in which order they are launched. The host reads nothing off the device and
every shape follows from the inputs' shapes, so that a call can be captured in a CUDA graph.
docs/kernels.md says what the kernels do.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math

import torch
from torch import Tensor

from supcon_kernels import partial_sums, triton_launch, triton_run, triton_soft, triton_tiles
from supcon_kernels.backends.protocol import Anchors, Made, Results, Wanted
from supcon_kernels.problem import Problem
from supcon_kernels.triton_call import DTYPES, Call, Side, room
from supcon_kernels.triton_shares import Shares

LN2 = math.log(2.0)
_INTERPRETED = triton_run.INTERPRETED
# The first with triton.knobs, by which the kernels know the interpreter.
_OLDEST_TRITON = (3, 4)


def _not_installed() -> str | None:
    """What this installation lacks, in one sentence."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton."
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_TRITON:
        return f"triton is of version {version}, and it needs 3.4 or newer."
    if torch.version.hip is not None and not _INTERPRETED:
        return "its kernels are for NVIDIA's chips, and this torch is built for AMD's."
    return None


_lacks = _not_installed()


def unavailable() -> str | None:
    """Why this backend cannot run on this machine, in one sentence; None: it can."""
    if _lacks is not None or _INTERPRETED:
        return _lacks
    if not torch.cuda.is_available():
        return "there is no CUDA device."
    refusals = [_too_old(torch.device("cuda", k)) for k in range(torch.cuda.device_count())]
    return None if None in refusals else refusals[0]


def description() -> str:
    """What of the kernels has been shown, and what has not."""
    return "(measured on sm_90; compiled for sm_80, sm_86 and sm_100)"


def why_not(problem: Problem) -> str | None:
    """Why this backend cannot take ``problem``, in one sentence; None: it can."""
    if _lacks is not None:
        return _lacks
    device = problem.rows.device
    if device.type != "cuda" and not (_INTERPRETED and device.type == "cpu"):
        return f"the features are on {device}, and it runs on CUDA."
    if problem.rows.dtype not in DTYPES:
        return f"it takes float32, float16 and bfloat16 features, not {problem.rows.dtype}."
    if problem.weights is not None:
        return "it takes labels or none, not a mask."
    is_default = problem.summation == "out" and problem.denominator == "all"
    if not problem.has_integer_labels and not is_default:
        return "it takes soft labels with summation='out' and denominator='all' only."
    if problem.rows.shape[-1] > triton_tiles.MAX_DIM:
        return f"it takes up to {triton_tiles.MAX_DIM} features, not {problem.rows.shape[-1]}."
    if problem.num_rows * problem.num_cols > triton_launch.MAX_PAIRS:
        return f"it takes up to 2^40 pairs, not {problem.num_rows} × {problem.num_cols}."
    return None if _INTERPRETED else _too_old(device)


def _too_old(device: torch.device) -> str | None:
    properties = torch.cuda.get_device_properties(device)
    if properties.major >= 8:
        return None
    capability = f"{properties.major}.{properties.minor}"
    return f"{properties.name} is of compute capability {capability}, and it needs 8.0 or newer."


def saved(problem: Problem) -> tuple[Tensor, Tensor]:
    """Statistics (5, N), and room for the prepared rows and columns.

    The statistics of an anchor are the sum of its denominator's powers; the number of its
    positives, or what soft ones weigh, or ("in") the sum of their powers, infinite where the anchor
    does not contribute; the weight of the softmax part of its gradient; and the exponents that both
    sums are shifted by.
    """
    stats = problem.rows.new_empty(5, problem.num_rows, dtype=torch.float32)
    return stats, room(problem)


def forward(problem: Problem, reduction: str) -> Results:
    """The loss, and the rows and columns as the kernels take them."""
    call = Call(problem)
    if not problem.symmetric or call.plan.both:
        return Results.of_ways(_losses(call, reduction))
    return Results.of_ways([_losses(Call(way), reduction)[0] for way in problem.ways()])


def forward_of_some(problem: Problem, negatives: Tensor | None = None) -> tuple[Results, Tensor]:
    """The loss of each row, and the sums of columns that have other contrasts besides."""
    call = Call(problem)
    if call.plan.both:
        with call.on_device():
            sums, of_cols = _forward_sums(call, col_negatives=negatives)
            assert of_cols is not None
            columns = _partial_sums(call, call.cols, of_cols[-1], negatives)
            return _loss(call, "none", call.rows, sums), columns
    one_way, other_way = map(Call, problem.ways())
    (of_rows,) = _losses(one_way, "none")
    with other_way.on_device():
        sums, _ = _forward_sums(other_way, of_nothing=True, negatives=negatives)
        return of_rows, _partial_sums(other_way, other_way.rows, sums[-1], negatives)


def _losses(call: Call, reduction: str) -> list[Results]:
    """The rows' loss and, of a symmetric problem, that of the columns, of one set of scores."""
    with call.on_device():
        of_rows, of_cols = _forward_sums(call)
        results = [_loss(call, reduction, call.rows, of_rows)]
        if of_cols is not None:
            results.append(_loss(call, reduction, call.cols, of_cols))
    return results


def _forward_sums(
    call: Call,
    *,
    of_nothing: bool = False,
    negatives: Tensor | None = None,
    col_negatives: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Sums of all pairs by each look: (pieces, 4, padded rows), and (slots, 4, padded columns) if made at once.

    Args:
        call: whose pairs.
        of_nothing: what no program writes of the rows is a sum of nothing.
        negatives: (N,) the rows' log-sum-exp over all negatives, if there are others than these;
            then only positives are looked at.
        col_negatives: (M,) the same of columns.
    """
    plan, rows, cols = call.plan, call.rows, call.cols
    call.place(room(call.problem))
    call.prepare(anchors=(rows, cols) if plan.both else (rows,))
    shares = plan.forward_shares(plan.running[0])
    looks = range(2 if plan.looks_twice else 1)
    of_rows = [call.sums(shares.max_pieces, rows, of_nothing=of_nothing) for _ in looks]
    of_cols, both = None, {}
    if plan.both:
        of_cols = [call.sums(shares.num_col_slots, cols, of_nothing=True) for _ in looks]
    if negatives is not None:
        of_rows[0][0, :2, : rows.num_rows] = _power(negatives)
    for look in looks if negatives is None else looks[-1:]:
        if of_cols is not None:
            both = {"row_valid_ptr": rows.valid, "col_sums_ptr": of_cols[look]}
            if look > 0:
                known = torch.stack(_added_up(of_cols[0][:, 0], of_cols[0][:, 1]))
                if col_negatives is not None:
                    known[:, : cols.num_rows] = _power(col_negatives)
                both["first_col_sums_ptr"] = known
        for running in plan.running:
            call.run(
                plan.forward(running, first_look=look < looks[-1]),
                **call.pairs(rows),
                **plan.forward_shares(running).arguments,
                **both,
                col_valid_ptr=cols.valid,
                first_sums_ptr=of_rows[0],
                sums_ptr=of_rows[look],
            )
    return of_rows, of_cols


def _added_up(
    powers: Tensor, exponents: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """(n,) totals of powers · 2^exponents (pieces, n), over 2^ the largest exponents (n,), and these."""
    largest = exponents.amax(dim=0)
    scaled = (exponents - largest).exp2_().mul_(powers)
    return scaled.sum(dim=0, dtype=dtype), largest


def _partial_sums(call: Call, owner: Side, sums: Tensor, negatives: Tensor | None) -> Tensor:
    """A side's sums (k, n), see ``partial_sums``, of those of the pair kernels (pieces, 4, padded n)."""
    total = None if call.soft is None else triton_soft.put_means(call, owner, sums)
    is_mean = call.problem.summation == "out"
    *rest, of_positives, pos_largest = sums[..., : owner.num_rows].unbind(1)
    lse = _log_sum(*rest) if negatives is None else negatives
    if is_mean:
        of_positives = of_positives.sum(dim=0, dtype=torch.float64) * LN2
    else:
        of_positives = _log_sum(of_positives, pos_largest)
    if total is None:
        total = owner.num_positives[: owner.num_rows].double()
    else:
        of_positives = of_positives * total
    found = [lse, of_positives, total]
    if call.plan.looks_twice:
        found.append(rest[0].sum(dim=0, dtype=torch.float64) if is_mean else _log_sum(*rest))
    valid = owner.valid[: owner.num_rows]
    poison = (call.rows.valid.sum() + call.cols.valid.sum()) * 0
    of_all = torch.stack(found)
    return torch.where(valid == 0, of_all, of_all + poison)


def _power(lse: Tensor) -> Tensor:
    """(2, n) float32 of log-sum-exps (n,): a sum, and the exponent of two that it is times."""
    exponent = (lse / LN2).floor()
    # A kernel without a maximum takes sums as they are; it has none that are so small or so large.
    exponent = torch.where(exponent.abs() < 100, 0.0, exponent).clamp(min=triton_launch.LOWEST)
    return torch.stack(((lse - exponent * LN2).exp(), exponent)).float()


def _log_sum(powers: Tensor, exponents: Tensor) -> Tensor:
    """(n,) float64 logarithm of the sum over the pieces of powers · 2^exponents (pieces, n)."""
    total, largest = _added_up(powers, exponents, torch.float64)
    return total.log() + largest.double() * LN2


def statistics_of(problem: Problem, sums: Tensor) -> Tensor:
    """The statistics, given the sums over all contrasts."""
    contributes = partial_sums.contributes(problem, sums)
    sums = torch.where(contributes, sums, 1.0)
    lse, of_positives, total = sums[:3]
    power, exponent = _power(lse)
    pos_exponent = (of_positives / LN2).floor()
    normaliser = total
    if problem.summation == "in":
        normaliser = (of_positives - pos_exponent * LN2).exp()
    softmax_weight = partial_sums.softmax_weights(problem, sums)
    found = torch.stack([power, normaliser, softmax_weight, exponent, pos_exponent]).float()
    if not problem.has_integer_labels:
        triton_soft.keep_totals(found, total)
    found[1] = torch.where(contributes, found[1], torch.inf)
    return found


def _loss(call: Call, reduction: str, owner: Side, sums: list[Tensor]) -> Results:
    """The loss of a side's anchors, of the sums by each look."""
    shares, others = call.plan.forward_shares(call.plan.running[0]), call.cols
    if owner is not call.rows:
        shares, others = Shares.of_pieces(len(sums[0])), call.rows
    loss = call.new(owner.num_rows if reduction == "none" else ())
    count, stats = call.new(()), call.new((5, owner.num_rows))
    if call.soft is not None:
        total = triton_soft.put_means(call, owner, sums[0])
    launch = call.plan.loss(reduction, owner.num_rows)
    call.run(
        launch,
        **owner.arguments(),
        **shares.arguments,
        sums_ptr=sums[0],
        second_sums_ptr=sums[-1],
        col_valid_ptr=others.valid,
        partials_ptr=call.new((2, launch.grid[0]), torch.float64),
        loss_ptr=loss,
        count_ptr=count,
        stats_ptr=stats,
        padded_cols=0 if others is owner else others.padded,
    )
    if call.soft is not None:
        triton_soft.keep_totals(stats, total)
    return Results(loss, count, stats, call.prepared)


def backward(
    problem: Problem, anchors: Anchors, col_anchors: Anchors | None, wanted: Wanted
) -> Made:
    """The gradients; without what the forward prepared, rows are prepared again."""
    call = Call(problem)
    plan, rows = call.plan, call.rows
    grad_rows = grad_cols = None
    grad_tau = call.new(()) if wanted.temperature else None
    with call.on_device():
        if anchors.prepared is None:
            call.place(room(problem))
            call.prepare()
        else:
            call.place(anchors.prepared)
        sides = [anchors] if col_anchors is None else [anchors, col_anchors]
        peak = _peak(sides)
        weights, (factor, *_) = zip(*[call.weights(side, peak) for side in sides])
        both_anchor = plan.square or col_anchors is not None
        if call.soft is not None:
            pulls = [triton_soft.taken_pull(*pair) for pair in zip(weights, sides)]
            call.soft_pulls = pulls[0], pulls[-1] if both_anchor else None
        uses_rows = wanted.rows or wanted.temperature
        of_cols = weights[-1] if both_anchor else None
        products = call.products(weights[0], of_cols, uses_rows, wanted.cols)
        if uses_rows:
            gradient, dots = call.gradient(rows, *next(products), factor, wanted)
            grad_rows = gradient if wanted.rows else None
        if wanted.cols:
            grad_cols, _ = call.gradient(
                call.cols, *next(products), factor, wanted._replace(temperature=False)
            )
        if wanted.temperature:
            call.run(
                plan.temperature_gradient(),
                dots_ptr=dots,
                temperature_gradient_ptr=grad_tau,
                padded_rows=rows.padded,
                part=1.0 if of_cols is None or problem.symmetric else 0.5,
            )
    return Made(grad_rows, grad_cols, grad_tau)


def _peak(sides: list[Anchors]) -> Tensor:
    """0-dim: the largest gradient, of either sign, of an anchor that contributes."""
    first = sides[0].grad_loss
    if first.ndim == 0:
        if all(side.grad_loss is first for side in sides):
            return first
        return torch.stack([side.grad_loss for side in sides]).abs().amax()
    sizes = [torch.where(s.stats[1] == torch.inf, 0.0, s.grad_loss).abs() for s in sides]
    every = torch.cat(sizes) if len(sizes) > 1 else sizes[0]
    return every.amax() if len(every) else every.sum()
