"""The backends, best first, and the choice among them, made on metadata alone.

Each backend answers in one sentence why it cannot run here (``unavailable``) and why it cannot take
a call (``why_not``); the first that has nothing to say to a call takes it. ``torch.compile`` traces
``why_not``, so that it looks at the call and at what was known at import alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from supcon_kernels.backends import native, reference, tiled, triton
from supcon_kernels.backends.protocol import Backend, Fused
from supcon_kernels.problem import Problem

FUSED: dict[str, Fused] = {"native": native, "triton": triton, "tiled": tiled}
BACKENDS: dict[str, Backend] = {**FUSED, "reference": reference}


def available_backends() -> dict[str, str | None]:
    """The backends, best first: None where ready, else one sentence that says why it cannot run here."""
    return {name: backend.unavailable() for name, backend in BACKENDS.items()}


def choose(problem: Problem, name: str | None) -> str:
    """The name of the backend that takes ``problem``: the first that can, or ``name``.

    Raises:
        ValueError: ``name`` is unknown, or that backend cannot take the call.
    """
    if name is not None and (not isinstance(name, str) or name not in BACKENDS):
        raise ValueError(f"backend must be None or one of {list(BACKENDS)}, got {name!r}")
    refusals = []
    for candidate in BACKENDS if name is None else (name,):
        refusal = BACKENDS[candidate].why_not(problem)
        if candidate != "reference" and _is_transformed(problem):
            refusal = "forward-mode derivatives and torch.func work with backend='reference' only."
        if refusal is None:
            return candidate
        refusals.append(f"backend {candidate!r} cannot take this call: {refusal}")
    raise ValueError("; ".join(refusals))


def _is_transformed(problem: Problem) -> bool:
    """Whether a derivative is being taken that the operator has no formula for."""
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(
        forward_ad.unpack_dual(x).tangent is not None
        for x in (problem.rows, problem.cols, problem.temperature_tensor)
        if isinstance(x, Tensor)
    )
