"""How a device's time is measured: behind a queue that never runs dry, in turns, kernel by kernel.

A call is given ``mark`` and calls it between its phases. On CUDA a burst of calls is queued while
the device spins, so that the times between marks hold no wait for Python; ``is_ahead`` says whether
that succeeded. Inputs may lie in the L2 cache, as those of a loss do behind the network's head.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

Mark = Callable[[], None]
Call = Callable[[Mark], object]

BURST_CALLS = 10
MIN_ROUNDS, MAX_ROUNDS = 3, 30
CYCLES_PER_MS = 2_000_000
MAX_SPIN_MS = 200.0
TRIES = 4


@dataclass
class Laps:
    """Times in ms of every call of one name, from mark to mark; whether the queue was always ahead."""

    calls: list[list[float]] = field(default_factory=list)
    is_ahead: bool = True

    def lap(self, index: int) -> float:
        """The median of one phase."""
        return statistics.median(laps[index] for laps in self.calls)

    @property
    def totals(self) -> list[float]:
        return [sum(laps) for laps in self.calls]

    @property
    def median(self) -> float:
        return statistics.median(self.totals)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.totals, n=4, method="inclusive")
        return low, high


def time_interleaved(calls: Mapping[str, Call], device: str, budget_s: float) -> dict[str, Laps]:
    """The calls take turns, in bursts, each first in its round in turn, until the time is spent."""
    laps = {name: Laps() for name in calls}
    names = list(calls)
    for call in calls.values():
        call(_no_mark)
    end_s = time.perf_counter() + budget_s
    for turn in range(MAX_ROUNDS if calls else 0):
        if turn >= MIN_ROUNDS and time.perf_counter() > end_s:
            break
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            burst, is_ahead = time_burst(calls[name], device)
            laps[name].calls += burst
            laps[name].is_ahead &= is_ahead
    return laps


def time_burst(call: Call, device: str) -> tuple[list[list[float]], bool]:
    """Times of a few calls in a row; fewer where they are long, or too many launches for a queue."""
    if device != "cuda":
        return [_on_host(call)], True
    torch.cuda.synchronize()
    begun_s = time.perf_counter()
    call(_no_mark)
    host_ms = 1e3 * (time.perf_counter() - begun_s)
    torch.cuda.synchronize()
    whole_ms = 1e3 * (time.perf_counter() - begun_s)
    num_calls = max(1, min(BURST_CALLS, round(50 / whole_ms)))
    spin_ms = 1 + 1.5 * num_calls * host_ms
    for _ in range(TRIES):
        laps, is_ahead = _behind_a_spin(call, num_calls, min(spin_ms, MAX_SPIN_MS))
        if is_ahead:
            break
        num_calls, spin_ms = max(1, num_calls // 2), 2 * spin_ms
    return laps, is_ahead


def _behind_a_spin(call: Call, num_calls: int, spin_ms: float) -> tuple[list[list[float]], bool]:
    """Queue the calls while the device spins; answer whether all were queued before it was done."""
    events: list[list[torch.cuda.Event]] = []

    def mark() -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        events[-1].append(event)

    torch.cuda._sleep(int(spin_ms * CYCLES_PER_MS))
    spun = torch.cuda.Event()
    spun.record()
    for _ in range(num_calls):
        events.append([])
        mark()
        call(mark)
        mark()
    is_ahead = not spun.query()
    torch.cuda.synchronize()
    return [[a.elapsed_time(b) for a, b in itertools.pairwise(each)] for each in events], is_ahead


def _on_host(call: Call) -> list[float]:
    moments = [time.perf_counter()]
    call(lambda: moments.append(time.perf_counter()))
    moments.append(time.perf_counter())
    return [1e3 * (b - a) for a, b in itertools.pairwise(moments)]


def _no_mark() -> None:
    pass


def eager_ms(call: Call, device: str, num_calls: int = 20) -> float:
    """What a call takes from Python, one after another: of the host's and the device's the longer."""
    synchronize(device)
    times = []
    for _ in range(3):
        begun_s = time.perf_counter()
        for _ in range(num_calls):
            call(_no_mark)
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - begun_s) / num_calls)
    return statistics.median(times)


def captured(call: Call) -> Call:
    """The call as a replay of its CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(_no_mark)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(_no_mark)
    return lambda mark: graph.replay()


def time_kernels(call: Call, num_calls: int = 3) -> list[dict[str, object]]:
    """What the profiler saw on the device in one call: names, launches and µs, the longest first."""
    from torch.autograd import DeviceType  # type: ignore[attr-defined]
    from torch.profiler import ProfilerActivity, profile

    call(_no_mark)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(num_calls):
            call(_no_mark)
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            found.setdefault(event.name, []).append(event.time_range.elapsed_us())
    kernels: list[dict[str, object]] = [
        {"kernel": name[:80], "launches": len(us) / num_calls, "us": sum(us) / num_calls}
        for name, us in found.items()
    ]
    return sorted(kernels, key=lambda kernel: -float(str(kernel["us"])))


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
