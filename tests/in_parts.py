"""The loss of both directions as the ranks of a group make it, in one process: of some rows at a time."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from supcon_kernels import backends, op, partial_sums, supcon_loss
from supcon_kernels.backends import FUSED
from supcon_kernels.backends.protocol import Anchors, Wanted
from supcon_kernels.problem import Problem


def loss_in_parts(*, backend: str, **arguments: Any) -> Tensor:
    """The sum of the losses of a symmetric call, of three parts of its rows that all see every column."""
    problem = problem_of(backend, **arguments)
    return _InParts.apply(*problem.operands()[:6], problem, backend)


def problem_of(backend: str, **arguments: Any) -> Problem:
    """The problem that ``supcon_loss`` builds of a call, one row for each view."""

    class Built(Exception):
        pass

    with mock.patch.object(backends, "choose", side_effect=Built) as choose:
        try:
            supcon_loss(**arguments, backend=backend)
        except Built:
            problem: Problem = choose.call_args.args[0]
    return problem.by_rows()


def parts_of(problem: Problem) -> list[Problem]:
    """Two thirds of the rows, nothing, and the rest."""
    n = problem.num_rows
    lengths = (2 * n // 3, 0, n - 2 * n // 3)
    rows, labels = problem.rows.split(lengths), problem.row_labels.split(lengths)
    return [
        dataclasses.replace(problem, rows=of_rows, row_labels=of_labels)
        for of_rows, of_labels in zip(rows, labels)
    ]


def negatives_of(parts: list[Problem], backend: str) -> Tensor | None:
    """(M,) log-sum-exp of each column over its negatives, where positives are looked at after them."""
    if parts[0].denominator != "one_positive":
        return None
    looks = [
        dataclasses.replace(part, summation="out", denominator="only_negatives") for part in parts
    ]
    _, sums = zip(*map(FUSED[backend].forward_of_some, looks))
    return partial_sums.merged(looks[0].ways()[1], sums)[0]


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *_, problem, backend = arguments
        parts, (_, mirrored) = parts_of(problem), problem.ways()
        negatives = negatives_of(parts, backend)
        found, sums = zip(*[FUSED[backend].forward_of_some(part, negatives) for part in parts])
        merged = partial_sums.merged(mirrored, sums)
        stats = FUSED[backend].statistics_of(mirrored, merged)
        ctx.parts = [(part, of_rows, stats) for part, of_rows in zip(parts, found)]
        ctx.backend = backend
        losses = [*(of_rows.loss for of_rows in found), partial_sums.losses(mirrored, merged)]
        return torch.cat(losses).sum() / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        made = []
        for part, of_rows, stats in ctx.parts:
            stats = torch.cat((of_rows.stats, stats), dim=1)
            anchors = Anchors(grad, grad.new_full((2,), 2.0), stats, of_rows.prepared)
            wanted = Wanted(True, True, True, unrounded=True)
            made.append(op.gradients_of(part, anchors, None, wanted, ctx.backend))
        rows, cols, temperature = zip(*made)
        assert {x.dtype for x in (*rows, *cols)} == {part.dtype for part, *_ in ctx.parts}
        tau = None if not ctx.needs_input_grad[5] else sum(temperature)
        return torch.cat(rows), sum(cols), None, None, None, tau, None, None
