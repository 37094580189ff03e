"""What a multiprocessor of each architecture has, and how many programs it holds at a time."""

from __future__ import annotations

from codegen.sass import WARP

SHARED_KIB = {80: 163, 86: 99, 90: 227, 100: 227}
"""Shared memory that one program may have, by architecture."""
TENSOR_MEMORY_COLUMNS = 512  # of a multiprocessor from sm_100 on, where products accumulate
MULTIPROCESSOR = {80: (164, 64), 86: (100, 48), 90: (228, 64), 100: (228, 64)}
"""KiB of shared memory, of which each program has one taken off, and warps; 65,536 registers."""
# Of a multiprocessor in a clock: multiply-adds of 16 bits; for all, 16 exponentials and 128 instructions.
MACS = {80: 1024, 86: 512, 90: 2048, 100: 4096}


def programs_of(arch: int, registers: int, shared_bytes: int, num_warps: int) -> int:
    """How many programs a multiprocessor holds at a time."""
    shared_kib, most_warps = MULTIPROCESSOR[arch]
    by_registers = 65536 // (-(-registers // 8) * 8 * WARP * num_warps)
    by_memory = shared_kib * 1024 // (shared_bytes + 1024)
    return min(by_registers, by_memory, most_warps // num_warps)
