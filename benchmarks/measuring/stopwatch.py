"""How time is measured: providers taking turns in one run, and the machine's own peak."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from measuring.providers import Provider
from measuring.workloads import Problem

MIN_ROUNDS = 3
MAX_ROUNDS = 50
BURST_MS = 5.0
MAX_BURST = 20
PHASES = ("forward", "backward", "both")
PEAK_SHAPES = {  # rows, columns, depth
    "cpu": ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 4096, 1024), (3072, 768, 3072)),
    "cuda": ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 16384, 4096)),
}
PEAK_REPEATS = 3
PEAK_PATIENCE_MS = 1000.0

T = TypeVar("T")


@dataclass
class Samples:
    """Times of one provider's calls, by phase; `both` is a fresh step, not a sum."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)


def elapsed_ms(device: str, call: Callable[[], T]) -> tuple[float, T]:
    """Time one call from an idle device to an idle device."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end), result
    start_s = time.perf_counter()
    result = call()
    return (time.perf_counter() - start_s) * 1e3, result


def time_interleaved(
    providers: Sequence[Provider], problem: Problem, budget_s: float
) -> dict[str, Samples]:
    """Let the providers take turns until the budget is spent, each first in its round in turn.

    A turn is one call, or a short burst of them where a call is brief, so that every provider
    meets the same caches and the same neighbours. Slow providers run MIN_ROUNDS in any case.
    """
    if not providers:
        return {}
    samples = {provider.name: Samples() for provider in providers}
    bursts = {provider.name: _burst_length(provider, problem) for provider in providers}
    deadline_s = time.perf_counter() + budget_s
    gc.collect()
    gc.disable()
    try:
        for turn in range(MAX_ROUNDS):
            if turn >= MIN_ROUNDS and time.perf_counter() > deadline_s:
                break
            first = turn % len(providers)
            for provider in (*providers[first:], *providers[:first]):
                for _ in range(bursts[provider.name]):
                    _time_phases(provider, problem, samples[provider.name])
    finally:
        gc.enable()
    return samples


def time_in_turn(
    steps: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, tuple[list[float], list[float]]]:
    """The milliseconds of each step in each round on the CPU, by the clock and of the processor."""
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in steps}
    for of_round in range(rounds + 1):
        for name, step in steps.items():
            start_s, processor_s = time.perf_counter(), time.process_time()
            step()
            if of_round > 0:  # the first finds its memory
                found[name][0].append((time.perf_counter() - start_s) * 1e3)
                found[name][1].append((time.process_time() - processor_s) * 1e3)
    return found


def _burst_length(provider: Provider, problem: Problem) -> int:
    """How many calls fill a turn; the call that finds out is also a warm-up."""
    step_ms, _ = elapsed_ms(problem.workload.device, lambda: provider.step(problem))
    return min(MAX_BURST, max(1, math.floor(BURST_MS / step_ms)))


def _time_phases(provider: Provider, problem: Problem, samples: Samples) -> None:
    device = problem.workload.device
    forward_ms, backward_ms = _time_halves(provider, problem)
    both_ms, _ = elapsed_ms(device, lambda: provider.step(problem))
    samples.forward.append(forward_ms)
    samples.backward.append(backward_ms)
    samples.both.append(both_ms)


def _time_halves(provider: Provider, problem: Problem) -> tuple[float, float]:
    """Time the forward, then the backward of its very graph, which dies with this call."""
    device = problem.workload.device
    forward_ms, output = elapsed_ms(device, lambda: provider.forward(problem))
    backward_ms, _ = elapsed_ms(device, lambda: provider.backward(problem, output))
    return forward_ms, backward_ms


def gemm_peak_gflops(dtype: torch.dtype, device: str) -> float:
    """The fastest dense product that torch does here: a floor under the machine's FMA peak.

    For 16-bit inputs the float32 product counts too, as they may be widened to it.
    """
    dtypes = {dtype, torch.promote_types(dtype, torch.float32)}
    return max(_gemm_gflops(each, device) for each in dtypes)


def _gemm_gflops(dtype: torch.dtype, device: str) -> float:
    best = 0.0
    for rows, cols, depth in PEAK_SHAPES[device]:
        left = torch.randn(rows, depth, device=device).to(dtype)
        right = torch.randn(depth, cols, device=device).to(dtype)
        for _ in range(1 + PEAK_REPEATS):
            time_ms, _ = elapsed_ms(device, lambda: left @ right)  # noqa: B023
            best = max(best, 2e-6 * rows * cols * depth / time_ms)
            if time_ms > PEAK_PATIENCE_MS:
                return best
    return best


def fma_peak_gflops(dtype: torch.dtype, device: str) -> float:
    """What all threads do with registers alone, measured by the compiled core; 0 without it."""
    from supcon_kernels.backends import native

    if device != "cpu" or native.unavailable() is not None:
        return 0.0
    flops: float = native.core.peak_flops(
        native.isa, str(dtype).removeprefix("torch."), torch.get_num_threads()
    )
    return flops * 1e-9


PEAK_SOURCES: dict[str, Callable[[torch.dtype, str], float]] = {
    "gemm_peak": gemm_peak_gflops,
    "fma_peak": fma_peak_gflops,
}
"""Measures of the machine's peak in GFLOP/s; the highest that any of them sees counts."""


def measure_peak(dtype: torch.dtype, device: str) -> tuple[float, str]:
    return max((measure(dtype, device), name) for name, measure in PEAK_SOURCES.items())
