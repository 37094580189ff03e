"""The checks of the GPU stages must be able to say no."""

from __future__ import annotations

import signal
import subprocess
from dataclasses import replace
from typing import Any

import pytest
import torch

from gpu import backend, behaviour, cases, choices, counters, driver, speed, timing
from gpu.place import Place
from measuring.workloads import Workload, make_problem
from supcon_kernels import triton_launch
from supcon_kernels.triton_tiles import Target

PLACE = Place(device="cpu", backend="tiled", is_tiny=True)


def test_a_training_run_that_ends_early_leaves_no_other_at_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start(place: Place, folder: str, name: str) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["sleep", "600" if name == "whole" else "0"]))
        return started[-1]

    monkeypatch.setattr(driver, "_start", start)
    with pytest.raises(AssertionError, match="the run ended before its first checkpoint"):
        list(driver._killed_and_resumed(replace(PLACE, is_tiny=False)))
    codes = [run.poll() for run in started]
    for run in started:
        run.kill()
        run.wait()
    assert codes == [-signal.SIGKILL, 0]


def test_verdicts_come_before_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*given: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(speed, "time_interleaved", hang)
    shape = speed.Shape(Workload(64, 16, num_classes=4), others=("dense",))
    rows = speed._measure(PLACE, shape, 1)
    assert [next(rows)["status"] for _ in range(3)] == ["ok"] * 3
    with pytest.raises(TimeoutError):
        next(rows)


def test_a_wrong_backend_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cases.supcon_loss
    monkeypatch.setattr(cases, "supcon_loss", lambda **given: right(**given) * 1.001)
    wrong = cases._found(PLACE, "ragged", torch.float32, ("out", "all"), True)
    assert wrong["status"] == "wrong" and wrong["ratio"] > 1
    refused = replace(PLACE, backend="triton")
    monkeypatch.setattr(cases, "supcon_loss", right)
    found = cases._found(refused, "weighted_mask", torch.float32, ("out", "all"), False)
    assert found["status"] == "refused"


def test_a_step_that_varies_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = behaviour.supcon_loss
    behaviour.check_determinism(PLACE, make_problem(Workload(60)))
    monkeypatch.setattr(
        behaviour, "supcon_loss", lambda *args, **given: right(*args, **given) + torch.rand(())
    )
    with pytest.raises(AssertionError, match="differs by"):
        behaviour.check_determinism(PLACE, make_problem(Workload(60)))


def test_soft_labels_and_a_mask_are_watched_for_a_host_sync(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modes, watched = ["default"], set()
    right = behaviour.supcon_loss

    def loss(*args: torch.Tensor, **given: Any) -> torch.Tensor:
        if modes[-1] == "error":
            watched.update((name, given["backend"]) for name in ("labels", "mask") if name in given)
        return right(*args, **given)

    monkeypatch.setattr(Place, "needs_cuda", lambda place: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(behaviour, "supcon_loss", loss)
    checks = {n: part for n, part in behaviour.items(PLACE).items() if n.startswith("no host sync")}
    for part in checks.values():
        list(part())
    assert watched == {("labels", "tiled"), ("mask", "tiled")}
    assert modes[-1] == "default" and modes.count("error") == 6


def test_a_burst_is_made_shorter_until_the_queue_is_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def burst(call: timing.Call, num_calls: int, spin_ms: float) -> tuple[list[list[float]], bool]:
        tried.append((num_calls, spin_ms))
        return [[1.0]] * num_calls, num_calls <= 5

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "_behind_a_spin", burst)
    laps, is_ahead = timing.time_burst(lambda mark: None, "cuda")
    assert is_ahead and len(laps) == 5
    assert [num_calls for num_calls, _ in tried] == [10, 5] and tried[0][1] < tried[1][1]


def test_counters_are_read_by_pattern() -> None:
    text = """==PROF== Connected to process 12
"ID","Kernel Name","sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active","lts__t_bytes.sum","other"
"","","%","Mbyte",""
"0","_forward_kernel","61.5","1,024","7"
==PROF== Disconnected
"""
    (row,) = counters.read_counters(text)
    assert row["kernel"] == "_forward_kernel"
    assert row["counters"] == {
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active [%]": 61.5,
        "lts__t_bytes.sum [Mbyte]": 1024.0,
    }


def test_narrow_rows_can_be_measured_with_their_derivatives_in_blocks() -> None:
    def plan() -> triton_launch.Plan:
        call = ("bfloat16", 128, 8192, None, Target(90, 132), True, "out", "all", True, False)
        return triton_launch.plan_of(*call)

    assert not plan().is_wide
    with backend.in_blocks():
        assert plan().is_wide
    assert not plan().is_wide
    measured = [s for s in speed.shapes(Place()) if speed.IN_BLOCKS in s.others]
    assert {s.workload.dim for s in measured} == {128, 256}
    assert all("chunked" in s.others for s in measured)
    shapes = speed.shapes(Place())
    wide = [s for s in shapes if s.workload.dim > 256 and s.workload.num_rows < 65536]
    assert all("chunked" in s.others for s in wide)


def test_both_directions_are_the_same_loss_by_each_way() -> None:
    calls = choices.both_ways(Workload(32, 16, num_cols=32))
    one_call, *others = (call(lambda: None) for call in calls.values())
    for other in others:
        torch.testing.assert_close(other, one_call)
