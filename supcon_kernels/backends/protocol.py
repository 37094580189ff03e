"""What a backend is, and what it is given and gives beside the problem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from supcon_kernels.problem import Problem, as_asked, mean_of_ways


class Wanted(NamedTuple):
    """Which gradients are wanted. Where the rows are the columns, there is one, of the rows.

    Attributes:
        rows, cols, temperature: of each.
        unrounded: the features' in the working dtype and not in theirs: parts, which are added up.
    """

    rows: bool = False
    cols: bool = False
    temperature: bool = False
    unrounded: bool = False


class Gradients(NamedTuple):
    """Gradients of the features, in their shapes, and of the temperature, 0-dim; (0,) where not wanted."""

    rows: Tensor
    cols: Tensor
    temperature: Tensor


class Made(NamedTuple):
    """``Gradients`` as a backend makes them: None where not wanted."""

    rows: Tensor | None
    cols: Tensor | None
    temperature: Tensor | None


class Anchors(NamedTuple):
    """The rows as anchors, or the columns: what came from above, and what the forward saved of them.

    Attributes:
        grad_loss: gradient of the loss, 0-dim, or (n,) of each anchor's; of no effect where the
            anchor does not contribute.
        divisor: 0-dim, of the sum of the losses.
        stats: (k, n) of each anchor, in the backend's own terms; the second is infinite where it
            does not contribute.
        prepared: what the forward made of rows and columns, if it is still there.
    """

    grad_loss: Tensor
    divisor: Tensor
    stats: Tensor
    prepared: Tensor | None = None

    def grad_losses(self) -> Tensor:
        """(n,) gradient of the sum of the losses, for each anchor."""
        return (self.grad_loss / self.divisor).expand(self.stats.shape[1])


class Results(NamedTuple):
    """What the forward computes.

    Attributes:
        loss: 0-dim, or (N,) where the reduction is "none".
        divisor: 0-dim, of the sum of the anchors' losses, at least 1; (2,) where symmetric, of the
            rows' sum and of the columns'.
        stats: (k, N) as in ``Anchors``. Where symmetric (k, N + M): the columns come after the rows.
        prepared: as in ``Anchors``, or nothing.
    """

    loss: Tensor
    divisor: Tensor
    stats: Tensor
    prepared: Tensor

    @staticmethod
    def of(losses: tuple[Tensor, Tensor, Tensor], stats: Tensor, reduction: str) -> Results:
        """Of losses as ``Problem.reduced`` has them, with nothing prepared."""
        loss, divisor = as_asked(*losses, reduction)
        return Results(loss, divisor, stats, loss.new_empty(0))

    @staticmethod
    def of_ways(results: Sequence[Results]) -> Results:
        """Of a problem, given those of its ``ways``."""
        if len(results) == 1:
            return results[0]
        losses, divisors, stats, prepared = zip(*results)
        return Results(
            mean_of_ways(losses), torch.stack(divisors) * 2, torch.cat(stats, dim=1), prepared[0]
        )


class Backend(Protocol):
    """A module that says of itself why it cannot be used."""

    def unavailable(self) -> str | None:
        """Why this backend cannot run on this machine, in one sentence; None: it can."""

    def why_not(self, problem: Problem) -> str | None:
        """Why this backend cannot take ``problem``, in one sentence; None: it can."""


class Fused(Backend, Protocol):
    """One that computes below the operator, and so makes the gradient itself."""

    def saved(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """The statistics and what is prepared of one way, not filled."""

    def forward(self, problem: Problem, reduction: str) -> Results:
        """The loss, and what the backward takes.

        Args:
            problem: one that the backend has nothing to say against.
            reduction: as in ``supcon_loss``.
        """

    def forward_of_some(
        self, problem: Problem, negatives: Tensor | None = None
    ) -> tuple[Results, Tensor]:
        """The loss (N,) of each row of a symmetric problem, and the sums (k, M) of its columns, which
        have other contrasts besides these rows: see ``partial_sums``.

        Args:
            problem: one whose rows meet all their contrasts.
            negatives: for "one_positive", (M,) each column's log-sum-exp over all its negatives,
                in the accumulation dtype.
        """

    def statistics_of(self, problem: Problem, sums: Tensor) -> Tensor:
        """The statistics (k, n) of anchors, given the sums over all their contrasts."""

    def backward(
        self, problem: Problem, anchors: Anchors, col_anchors: Anchors | None, wanted: Wanted
    ) -> Made:
        """The gradients of the losses of all anchors.

        Args:
            problem: what ``forward`` was given.
            anchors: the rows.
            col_anchors: the columns, where these are anchors, too, with the same divisor; to
                "native" then no column is a row itself. Unless the problem is symmetric, the
                temperature's gradient is half of the sum of both.
            wanted: which gradients.
        """
