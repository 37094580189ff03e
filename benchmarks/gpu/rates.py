"""A kernel that does nothing but exponentials: the rate that the card has for them."""

# Triton 3.6 looks up annotations, so that only constants have one.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

BLOCK, NUM_ROUNDS, PROGRAMS_PER_SM = 4096, 2048, 4


@triton.jit
def _exponentials_kernel(out_ptr, num_rounds, BLOCK: tl.constexpr):
    """One program: a block of numbers in registers, each x → 2^-x, again and again."""
    x = tl.arange(0, BLOCK).to(tl.float32) / BLOCK
    for _ in range(num_rounds):
        x = tl.exp2(-x)
    tl.store(out_ptr + tl.program_id(0), tl.sum(x))


def exponentials() -> tuple[int, Callable[[], object]]:
    """How many exponentials a run has, and the run."""
    num_programs = PROGRAMS_PER_SM * torch.cuda.get_device_properties().multi_processor_count
    out = torch.empty(num_programs, device="cuda")
    run = functools.partial(
        _exponentials_kernel[(num_programs,)], out, NUM_ROUNDS, BLOCK=BLOCK, num_warps=8
    )
    return num_programs * NUM_ROUNDS * BLOCK, run
