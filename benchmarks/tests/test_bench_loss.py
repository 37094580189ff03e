"""The benchmark's workloads under pytest-benchmark, and the benchmark's own honesty.

`pytest benchmarks` times one step of every provider at two sizes, on one thread so that a busy
machine does not stall it; nothing here asserts a time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import bench_both_ways
import bench_loss
import bench_targets
from measuring import admission
from measuring.peak_memory import measure_peak_mib
from measuring.providers import (
    FACTORIES,
    Provider,
    Unavailable,
    dense_loss,
    make_provider,
    provider_names,
)
from measuring.stopwatch import PEAK_SOURCES
from measuring.workloads import Problem, Workload, compute_truth, make_problem
from reporting import rows
from reporting.rows import read_report, write_report

VARIANTS = [(s, d) for s in ("out", "in") for d in ("all", "one_positive", "only_negatives")]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    """The script itself, on a problem that takes no time to speak of."""
    monkeypatch.setitem(PEAK_SOURCES, "gemm_peak", lambda dtype, device: 100.0)

    def run(providers: str) -> int:
        small = ["--sizes", "64", "--dim", "16", "--seconds", "0", "--no-memory"]
        out = ["--output-dir", str(tmp_path), "--name", "trial"]
        return bench_loss.main([*small, *out, "--providers", providers])

    return run


@pytest.mark.parametrize("num_rows", [256, 1024])
@pytest.mark.parametrize("name", provider_names())
@pytest.mark.benchmark(min_rounds=3, max_time=0.2, warmup=False)
def test_step(benchmark: BenchmarkFixture, name: str, num_rows: int) -> None:
    workload = Workload(num_rows)
    benchmark.group = f"forward and backward, N={num_rows}"
    try:
        provider = make_provider(name, workload)
    except Unavailable as why_not:
        pytest.skip(f"{name} is unavailable: {why_not}")
    problem = make_problem(workload)
    if provider.has_loss:
        loss = provider.forward(problem)
        errors = compute_truth(problem).errors(loss.detach(), provider.backward(problem, loss))
        assert max(errors) <= workload.error_bound
    benchmark(provider.step, problem)


@pytest.mark.parametrize("num_cols", [0, 40], ids=["square", "rectangular"])
@pytest.mark.parametrize("variant", VARIANTS, ids="/".join)
def test_dense_formula_agrees_with_the_truth(variant: tuple[str, str], num_cols: int) -> None:
    workload = Workload(60, 16, num_cols, 3, 0.1, *variant, dtype="float64")
    problem = make_problem(workload)
    loss = dense_loss(problem)
    errors = compute_truth(problem).errors(loss.detach(), torch.autograd.grad(loss, problem.leaves))
    assert max(errors) <= workload.error_bound


def test_truth_agrees_with_a_nested_loop() -> None:
    problem = make_problem(Workload(24, 8, num_classes=3, dtype="float64"))
    unit = torch.nn.functional.normalize(problem.features.detach())
    total = 0.0
    for i in range(24):
        others = [j for j in range(24) if j != i]
        scores = {j: float(unit[i] @ unit[j]) / 0.1 for j in others}
        lse = torch.tensor([scores[j] for j in others], dtype=torch.float64).logsumexp(0).item()
        positives = [j for j in others if problem.labels[j] == problem.labels[i]]
        total += sum(lse - scores[p] for p in positives) / len(positives)
    assert compute_truth(problem).loss.item() == pytest.approx(total / 24, rel=1e-12)


def keeps_the_self_pair(problem: Problem) -> Tensor:
    """A wrong loss: each anchor contrasts with itself as well."""
    copy = problem.features.detach()
    return dense_loss(replace(problem, contrast_features=copy, contrast_labels=problem.labels))


def has_a_slightly_wrong_gradient(problem: Problem) -> Tensor:
    """A wrong loss: the right value, a gradient one part in a thousand too large."""
    features = problem.features
    shifted = features + 1e-3 * (features - features.detach())
    return dense_loss(replace(problem, features=shifted))


def has_a_nan_in_its_gradient(problem: Problem) -> Tensor:
    """A wrong loss: the right value, and sqrt's infinite slope at zero in the gradient."""
    features = problem.features
    zero = (features - features.detach()).square().sum().sqrt()
    return dense_loss(problem) + zero


def is_not_a_number(problem: Problem) -> Tensor:
    return dense_loss(problem) * torch.nan


def crashes(problem: Problem) -> Tensor:
    raise RuntimeError("out of order")


@pytest.mark.parametrize(
    ("wrong", "shown"),
    [
        (keeps_the_self_pair, "WRONG ("),
        (has_a_slightly_wrong_gradient, "WRONG (1.0e-03)"),
        (has_a_nan_in_its_gradient, "WRONG (nan)"),
        (is_not_a_number, "WRONG (nan)"),
        (crashes, "suspect failed: RuntimeError: out of order"),
    ],
)
def test_wrong_provider_gets_no_speed(
    bench: Callable[[str], int],
    wrong: Callable[[Problem], Tensor],
    shown: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(FACTORIES, "suspect", lambda workload: Provider("suspect", wrong))
    assert bench("dense,suspect") == 1
    assert shown in capsys.readouterr().out
    suspect = [r for r in read_report(tmp_path / "trial.csv").results if r.provider == "suspect"]
    assert [r.time_ms for r in suspect] == [None]


def test_absent_provider_says_so_and_is_no_failure(
    bench: Callable[[str], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning.losses", None)
    assert bench("dense,pytorch-metric-learning") == 0
    assert "pytorch-metric-learning unavailable: not installed" in capsys.readouterr().out


def test_provider_that_would_not_fit_is_not_started(
    bench: Callable[[str], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(admission, "available_memory_bytes", lambda device: 1000)
    assert bench("dense") == 0
    assert "dense unavailable: needs about" in capsys.readouterr().out


def test_rows_survive_the_csv_and_carry_their_origin(
    bench: Callable[[str], int], tmp_path: Path
) -> None:
    assert bench("dense,matmuls") == 0
    report = read_report(tmp_path / "trial.csv")
    write_report(report, tmp_path / "again.csv")
    # Not the text: shares are derived anew from rounded times, and may end on another digit.
    assert read_report(tmp_path / "again.csv") == report
    assert {"cpu", "isa", "num_threads", "torch", "python", "commit", "dirty", "date"} <= set(
        report.machine
    )
    assert {r.phase for r in report.results} == {"forward", "backward", "both"}
    assert (tmp_path / "trial.png").stat().st_size > 10_000


def test_other_sizes_leave_the_committed_rows_alone(
    bench: Callable[[str], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RESULTS", "TRIALS"):
        monkeypatch.setattr(rows, name, tmp_path / name)
    small = ["--sizes", "64", "--dim", "16", "--seconds", "0", "--no-memory"]
    assert bench_loss.main([*small, "--providers", "dense"]) == 0
    assert not (tmp_path / "RESULTS").exists()
    assert (tmp_path / "TRIALS" / "loss_cpu_float32.csv").exists()
    assert rows.results_path("rows.csv", None, update=True).parent == rows.RESULTS


def test_peak_memory_is_that_of_the_provider_alone() -> None:
    """The two products hold one N×N matrix, and neither torch nor its libraries count."""
    workload = Workload(2048)
    matrix_mib = 2048**2 * 4 / 2**20
    peak = measure_peak_mib("matmuls", workload, num_threads=1)
    assert matrix_mib <= peak.both <= 1.5 * matrix_mib + 8


def test_every_kind_of_targets_is_measured(tmp_path: Path) -> None:
    small = ["--num-rows", "96", "--dim", "8", "--widths", "3", "--rounds", "1"]
    assert bench_targets.main([*small, "--output-dir", str(tmp_path)]) == 0
    rows = (tmp_path / bench_targets.RESULTS).read_text().splitlines()
    assert len(rows) == 1 + len(bench_targets.targets(96, [3]))


def test_both_directions_are_measured_in_every_way(tmp_path: Path) -> None:
    small = ["--num-rows", "96", "--dim", "8", "--rounds", "1", "--output-dir", str(tmp_path)]
    assert bench_both_ways.main(small) == 0
    rows = (tmp_path / bench_both_ways.RESULTS).read_text().splitlines()
    assert len(rows) == 1 + len(bench_both_ways.WAYS | bench_both_ways.VARIANTS)
