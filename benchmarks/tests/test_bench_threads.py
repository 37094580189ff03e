"""The simulation of threads: on jobs whose time is known, and on the core's own."""

from __future__ import annotations

import pytest

import bench_threads
from bench_threads import Costs, simulate
from supcon_kernels.backends import native

APART = [[(2 * k, 0, 2 * k + 1, 0, True)] for k in range(8)]  # no two jobs have a tile in common
IN_TURN = [[(0, k, -1, 0, True)] for k in range(8)]  # all add to one tile


def test_jobs_without_a_common_tile_are_shared_out():
    assert simulate(APART, Costs(1.0, 0.5), 4) == pytest.approx(4.0)
    assert simulate(APART, Costs(1.0, 0.5), 100) == pytest.approx(2.0)


def test_a_tile_takes_one_addition_at_a_time():
    assert simulate(IN_TURN, Costs(1.0, 1.0), 8) == pytest.approx(9.0)
    assert simulate(IN_TURN, Costs(1.0, 0.0), 8) == pytest.approx(1.0)


def test_a_turn_that_never_comes_is_noticed():
    with pytest.raises(AssertionError, match="wait for each other"):
        simulate([[(0, 1, -1, 0, True)]], Costs(1.0, 1.0), 2)


@pytest.mark.parametrize("threads", [1, 2, 16, 64])
@pytest.mark.parametrize("shape", [(1000, 1000, True), (5000, 5000, True), (300, 9000, False)])
def test_the_core_finishes_its_jobs(shape, threads):
    jobs = native.core.scheduled_jobs(*shape, True, threads)
    costs = Costs(1.0, 1.0)
    assert costs.of(jobs) / threads <= simulate(jobs, costs, threads) <= costs.of(jobs)


def test_rows_of_a_small_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_threads, "SECONDS", 0)
    monkeypatch.setattr(bench_threads, "GOALS", [(300, None, 8, 1.0), (40, 900, 4, 1.0)])
    bench_threads.main(["--dim", "8", "--output-dir", str(tmp_path)])
    assert "simulated_speed_up" in (tmp_path / bench_threads.RESULTS).read_text()
