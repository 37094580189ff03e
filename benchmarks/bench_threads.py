"""How far the CPU kernel goes with more threads: measured up to the machine's cores, simulated beyond.

python benchmarks/bench_threads.py writes threads_cpu_float32.csv. The core lists the jobs of its own
schedule, with what each waits for; a job costs what it took on one thread here; what threads do
not share is counted, too, and all of it stays. Memory traffic is capped, as if nothing were in a
cache, so that small tiles are not rewarded. Wall times check the model, of as many threads as there are cores.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from measuring.machine import describe_machine
from reporting.rows import add_output_options, results_path, write_table
from supcon_kernels.backends import native
from supcon_kernels.backends.protocol import Anchors, Wanted
from supcon_kernels.problem import Problem

RESULTS = "threads_cpu_float32.csv"
GIGABYTES_PER_SECOND = 200
TILE_ROWS, BYTES = 192, 4
SECONDS = 3  # of measuring a pass
# Rows, columns (None: square), threads, and the least speed-up that is wanted.
GOALS = [
    (1024, None, 8, 6.0),
    (2048, None, 16, 10.0),
    (4096, None, 16, 13.0),
    (8192, None, 16, 13.0),
    (8192, None, 32, 24.0),
    (16384, None, 32, 24.0),
    (16384, None, 64, 40.0),
    (32768, None, 64, 40.0),
    (256, 65536, 16, 12.0),
]
MAX_SERIAL_SHARE, SERIAL_SHARE_AT = 0.003, 8192

# Counter and turn of its tile of rows and of its tile of columns, and whether both are there.
Pair = tuple[int, int, int, int, bool]
Job = list[Pair]


@dataclass
class Costs:
    """Seconds of a pair of tiles: to compute it, and to add it to one of its tiles."""

    compute: float
    add: float

    def of(self, jobs: list[Job]) -> float:
        """Of all pairs on one thread."""
        return sum(
            self.compute * _weight(pair) + self.add * len(_places(pair)) * pair[4]
            for job in jobs
            for pair in job
        )


def _weight(pair: Pair) -> float:
    """A tile that meets itself is computed above the diagonal alone."""
    return pair[4] * (0.5 if pair[0] == pair[2] else 1.0)


def _places(pair: Pair) -> set[tuple[int, int]]:
    """The turns that it waits for."""
    return {place for place in (pair[:2], pair[2:4]) if place[0] >= 0}


def simulate(jobs: list[Job], costs: Costs, threads: int) -> float:
    """Seconds that so many threads take for the jobs, which they begin in order.

    A thread computes a pair, then adds to its two tiles, in either order, when their turns have come.
    """
    turns: dict[int, int] = {}
    waiting: dict[tuple[int, int], int] = {}
    todo = (job for job in jobs if job)
    number = itertools.count()
    events: list[tuple[float, int, int]] = []
    pairs: dict[int, list[Pair]] = {}
    is_whole: dict[int, bool] = {}
    left: dict[int, set[tuple[int, int]]] = {}
    adding: dict[int, tuple[int, int] | None] = {}

    def after(thread: int, now: float, seconds: float, what: tuple[int, int] | None) -> None:
        adding[thread] = what
        heapq.heappush(events, (now + seconds, next(number), thread))

    def go_on(thread: int, now: float) -> None:
        for place in sorted(left.get(thread, ())):
            if turns.get(place[0], 0) == place[1]:
                return after(thread, now, costs.add * is_whole[thread], place)
        if left.get(thread):
            waiting.update(dict.fromkeys(left[thread], thread))
            return None
        if not pairs.get(thread):
            pairs[thread] = list(next(todo, ()))
        if pairs[thread]:
            pair = pairs[thread].pop(0)
            left[thread], is_whole[thread] = _places(pair), pair[4]
            after(thread, now, costs.compute * _weight(pair), None)
        return None

    for thread in range(threads):
        go_on(thread, 0.0)
    now = 0.0
    while events:
        now, _, thread = heapq.heappop(events)
        if (done := adding[thread]) is not None:
            left[thread].discard(done)
            turns[done[0]] = done[1] + 1
            waiter = waiting.pop((done[0], done[1] + 1), None)
            if waiter is not None:
                for place in left[waiter]:
                    waiting.pop(place, None)
                go_on(waiter, now)
        go_on(thread, now)
    assert not waiting, "threads wait for each other"
    return now


@dataclass
class Measured:
    """Seconds of one pass: the part of it that threads cannot share, and all of it by number of threads."""

    serial: float
    by: dict[int, float]

    @property
    def alone(self) -> float:
        """On one thread."""
        return self.by[1]


def measure(
    num_rows: int, num_cols: int | None, dim: int, threads: list[int]
) -> tuple[Measured, Measured]:
    """The forward and the backward, on one thread and on others."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(num_rows, dim, generator=g)
    labels = torch.randint(10, (num_rows,), generator=g)
    cols = col_labels = None
    if num_cols is not None:
        cols = torch.randn(num_cols, dim, generator=g)
        col_labels = torch.randint(10, (num_cols,), generator=g)
    offset = 0 if num_cols is None else None
    problem = Problem(
        rows, cols, labels, col_labels, None, None, 0.1, offset, "out", "all", True, -100
    )
    results = native.forward(problem, "mean")
    anchors = Anchors(torch.ones(()), results.divisor, results.stats)
    wanted = Wanted(True, num_cols is not None)
    passes: list[Callable[[], object]] = [
        lambda: native.forward(problem, "mean"),
        lambda: native.backward(problem, anchors, None, wanted),
    ]
    forward, backward = (_measure_pass(run, threads) for run in passes)
    return forward, backward


def _measure_pass(run: Callable[[], object], threads: list[int]) -> Measured:
    # Once more on one thread, with what it could share left out.
    seconds: dict[int, list[float]] = {count: [] for count in (0, 1, *threads)}
    serial: list[float] = []
    start = time.perf_counter()
    while len(serial) < 3 or time.perf_counter() - start < SECONDS:
        for count, times in seconds.items():
            native.num_threads = lambda count=count: count  # type: ignore[misc]
            native.core.take_shared_seconds()
            begin = time.perf_counter()
            returned = run()
            times.append(time.perf_counter() - begin)
            if count == 0:
                serial.append(times[-1] - native.core.take_shared_seconds())
            del returned  # a gradient's pages are given back by the caller, in its own time
    native.num_threads = torch.get_num_threads
    return Measured(median(serial), {count: median(times) for count, times in seconds.items()})


def rows_of(
    num_rows: int, num_cols: int | None, dim: int, threads: list[int]
) -> list[dict[str, Any]]:
    """A row for each number of threads, with the machine left out."""
    cores = os.cpu_count() or 1
    forward, backward = measure(
        num_rows, num_cols, dim, [count for count in threads if count <= cores]
    )
    found = []
    for count in threads:
        seconds = 0.0
        compute = 0.0
        for measured, to_cols in ((forward, num_cols is None), (backward, True)):
            shape = (num_rows, num_cols or num_rows, num_cols is None)
            jobs = native.core.scheduled_jobs(*shape, to_cols, count)
            free_adds = Costs(1.0, 0.0)
            if measured is forward:
                compute = (measured.alone - measured.serial) / free_adds.of(jobs)
                costs = Costs(compute, 0.0)
            else:
                rest = measured.alone - measured.serial - compute * free_adds.of(jobs)
                costs = Costs(compute, rest / Costs(0.0, 1.0).of(jobs))
            num_pairs = sum(len(job) for job in jobs)
            tiles = 2 if measured is forward else 8  # read, and written, for a pair
            traffic = num_pairs * tiles * TILE_ROWS * dim * BYTES / (GIGABYTES_PER_SECOND * 1e9)
            seconds += measured.serial + max(simulate(jobs, costs, count), traffic)
        alone = forward.alone + backward.alone
        found.append(
            {
                "num_rows": num_rows,
                "num_cols": num_cols or "",
                "dim": dim,
                "threads": count,
                "simulated_speed_up": round(alone / seconds, 2),
                "measured_speed_up": round(alone / (forward.by[count] + backward.by[count]), 2)
                if count in forward.by
                else "",
                "serial_share": round((forward.serial + backward.serial) / alone, 5),
                "one_thread_ms": round(alone * 1e3, 3),
            }
        )
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--max-rows", type=int, default=max(n for n, *_ in GOALS))
    add_output_options(parser)
    options = parser.parse_args(argv)
    if (reason := native.unavailable()) is not None:
        parser.error(f"the native backend is not ready: {reason}")
    rows = []
    shapes = dict.fromkeys((n, m) for n, m, *_ in GOALS if n <= options.max_rows)
    for n, m in shapes:
        goals = {threads: goal for a, b, threads, goal in GOALS if (a, b) == (n, m)}
        for row in rows_of(n, m, options.dim, [1, 2, *goals]):
            row["goal"] = goals.get(row["threads"], "")
            rows.append(row)
            print(*(f"{name} {value}" for name, value in row.items() if value != ""), sep="  ")
    machine = describe_machine("cpu")
    path = results_path(RESULTS, options.output_dir, options.update)
    write_table(path, [row | machine for row in rows])
    missed = [row for row in rows if row["goal"] != "" and row["simulated_speed_up"] < row["goal"]]
    missed += [
        row
        for row in rows
        if row["num_rows"] == SERIAL_SHARE_AT and row["serial_share"] > MAX_SERIAL_SHARE
    ]
    for row in missed:
        print(f"MISSED: {row}", file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
