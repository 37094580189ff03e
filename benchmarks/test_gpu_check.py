"""The kit for a card, without one: every stage on a CPU, and what its runner makes of what goes wrong."""

from __future__ import annotations

import importlib
import json
import operator
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parents[1] / "tests"))

import gpu_check
import gpu_codegen
from gpu import (
    backend,
    behaviour,
    cases,
    counters,
    driver,
    processes,
    rehearse,
    report,
    speed,
    timing,
)
from gpu.journal import NAME, Journal, read_rows
from gpu.place import Place, Row
from gpu.processes import in_processes
from gpu.runner import Stage, run_stages
from gpu.summary import LIMIT, summary
from gpu_codegen import TOLD_APART, Compiled, Source
from workloads import Workload, make_problem

COMMAND = [sys.executable, str(Path(gpu_check.__file__))]
ON_CPU = ["--device", "cpu", "--backend", "tiled", "--tiny", "--jobs", "1"]
PLACE = Place(device="cpu", backend="tiled", is_tiny=True)

# --- every stage


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], str]:
    """The rows of all stages on a CPU, and what was printed."""
    folder = tmp_path_factory.mktemp("rehearsal")
    stages = [stage.name for stage in gpu_check.STAGES]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [*COMMAND, *stages, *ON_CPU, "--output-dir", str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout + done.stderr + (folder / "log.txt").read_text()
    assert sorted(path.name for path in folder.iterdir()) == ["log.txt", NAME, "summary.txt"]
    assert done.stdout == (folder / "summary.txt").read_text()
    return read_rows([folder]), done.stdout


@pytest.mark.parametrize("stage", [stage.name for stage in gpu_check.STAGES])
def test_each_stage_runs_on_a_cpu(stage: str, rehearsal: tuple[list[Row], str]) -> None:
    rows = [row for row in rehearsal[0] if row["stage"] == stage]
    ended = {row["item"]: row for row in rows if row.get("event") == "end"}
    skipped = {item for item, row in ended.items() if row["status"] == "skipped"}
    assert {row["status"] for row in ended.values()} <= {"ok", "skipped"}
    on_cuda = {"counters": 1, "sanitizers": 1, "behaviour": 3}
    assert len(skipped) == on_cuda.get(stage, 0)
    assert all(ended[item]["detail"] == "there is none on cpu" for item in skipped)
    (whole,) = [row for row in rows if row.get("event") == "stage"]
    assert whole["not_reached"] == []


def test_what_a_rehearsal_finds(rehearsal: tuple[list[Row], str]) -> None:
    rows, printed = rehearsal
    assert len([row for row in rows if "call" in row and row["status"] == "ok"]) == 18
    speed = {row["provider"]: row for row in rows if "both_ms" in row and not row["num_cols"]}
    assert set(speed) == {
        "dense",
        "chunked",
        "supcon_kernels[tiled]",
        "supcon_kernels[tiled], learned τ",
    }
    assert all(row["status"] == "ok" and row["forward_ms"] > 0 for row in speed.values())
    (memeff,) = [row for row in rows if row.get("provider") == "memeff"]
    assert memeff["status"] == "unavailable"
    assert {row["phase"] for row in rows if "kernel_ms" in row} == {"forward", "backward"}
    (training,) = [row for row in rows if "killed_after_step" in row]
    assert training["killed_after_step"] < training["resumed_to_step"] == 6
    refused = {row["case"] for row in rows if row.get("status") == "refused"}
    assert refused == set()  # tiled takes everything
    assert "ours[tiled]" in printed and len(printed) <= LIMIT


def test_without_a_gpu_it_says_what_it_would_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 0
    out = capsys.readouterr().out
    assert "no CUDA device" in out
    assert all(f"- {name}, " in out for name in gpu_check.FIRST_COMMAND)
    with pytest.raises(SystemExit):
        gpu_check.main(["speeed"])
    assert "no stage 'speeed': the stages are facts, " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu_check.main(["--wheels", "nowhere"])
    assert "--wheels nowhere: a folder that holds .whl files" in capsys.readouterr().err


def test_both_commands_end_within_nine_minutes() -> None:
    shares = {stage.name: stage.seconds for stage in gpu_check.STAGES}
    first = sum(shares[name] for name in gpu_check.FIRST_COMMAND)
    assert first <= 540 and sum(shares.values()) - first <= 540


# --- what goes wrong

FAULTY = """
import os, subprocess, sys, time
from gpu.place import Skipped

def items(place):
    return {"good": good, "raises": raises, "skips": skips, "hangs": hangs, "eats": eats, "dies": dies,
            "late": late, "last": good}

def good():
    yield {"number": float("nan")}

def raises():
    yield {"before": 1}
    raise ValueError("no such thing\\nsecond line")

def skips():
    raise Skipped("not here")

def hangs():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield {"pid": child.pid}
    time.sleep(600)

def eats():
    bytearray(1 << 62)

def dies():
    os.kill(os.getpid(), 9)

def late():
    yield {"status": "not reached"}
"""
SLOW = """
import time

def items(place):
    return {str(k): wait for k in range(500)}

def wait():
    for k in range(20):
        time.sleep(0.005)
        yield {"k": k, "text": "x" * 3000}
"""
RUN = """
import sys
from pathlib import Path
from gpu.journal import Journal
from gpu.place import Place
from gpu.runner import Stage, run_stages

name, folder = sys.argv[1:]
run_stages([Stage(name, 60, module=name)], Place("cpu", folder=folder), Journal(Path(folder)))
"""


def run_faulty(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *stages: Stage, **options: object
) -> list[Row]:
    """The rows of stages of the two modules above."""
    (folder / "faulty.py").write_text(FAULTY)
    (folder / "slow.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    journal = Journal(folder)
    run_stages(stages, replace(PLACE, folder=str(folder), **options), journal)
    journal.close()
    return read_rows([folder])


def test_a_part_that_fails_costs_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    first = Stage("first", 60, patience_s=1.0, module="faulty")
    absent = Stage("absent", 60, module="no_such_module")
    second = Stage("second", 60, patience_s=1.0, module="faulty", in_parallel=True)
    rows = run_faulty(tmp_path, monkeypatch, first, absent, second, num_jobs=3)
    for stage in ("first", "second"):
        ended = {r["item"]: r for r in rows if r["stage"] == stage and r.get("event") == "end"}
        assert {item: row["status"] for item, row in ended.items()} == {
            **{"good": "ok", "raises": "failed", "skips": "skipped", "hangs": "hung"},
            **{"eats": "out of memory", "dies": "died", "late": "time is up", "last": "ok"},
        }
        assert ended["raises"]["detail"] == "ValueError: no such thing"
        assert ended["dies"]["detail"] == "signal 9"
    (failed,) = [row for row in rows if row["stage"] == "absent" and row.get("event") == "end"]
    assert (failed["status"], "no_such_module" in failed["detail"]) == ("failed", True)
    assert [row["number"] for row in rows if "number" in row] == ["nan"] * 4
    assert [row["item"] for row in rows if "before" in row] == ["raises"] * 2
    for pid in (row["pid"] for row in rows if "pid" in row):  # what a part started ends with it
        assert not _is_alive(pid)
    assert "HUNG first: hangs: silent for 1 s" in summary(rows)
    assert re.search(r'File ".*faulty.py", line \d+ in hangs', (tmp_path / "log.txt").read_text())
    assert "first: good: ok" in capfd.readouterr().err


def _is_alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_a_stage_ends_with_its_time_and_the_next_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, next_one = Stage("short", 4, module="slow"), Stage("next", 30, 1.0, module="faulty")
    rows = run_faulty(tmp_path, monkeypatch, short, next_one)
    ends = {row["stage"]: row for row in rows if row.get("event") == "stage"}
    assert ends["short"]["not_reached"][-1] == "499"
    assert ends["next"]["not_reached"] == [] and ends["next"]["counts"]["ok"] == 2


def test_a_kill_at_any_moment_leaves_valid_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parent)]))
    for wait_s in (0.3, 0.02, 0.1):  # after the first row
        path = tmp_path / NAME
        size = path.stat().st_size if path.exists() else 0
        run = subprocess.Popen(
            [sys.executable, "-c", RUN, "slow", str(tmp_path)], stderr=subprocess.DEVNULL
        )
        while not path.exists() or path.stat().st_size <= size:
            time.sleep(0.01)
        time.sleep(wait_s)
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert all(row["stage"] == "slow" for row in read_rows([tmp_path]))


def test_what_a_part_has_started_ends_with_a_runner_that_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parent)]))
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, "faulty", str(tmp_path)], stderr=subprocess.DEVNULL
    )
    pids: list[int] = []
    while not pids:
        time.sleep(0.02)
        rows = read_rows([tmp_path]) if (tmp_path / NAME).exists() else []
        pids = [row["pid"] for row in rows if "pid" in row]
    run.kill()
    run.wait()
    for _ in range(100):
        if not _is_alive(pids[0]):
            return
        time.sleep(0.1)
    os.kill(pids[0], signal.SIGKILL)
    pytest.fail("a part's child has outlived the runner")


def test_an_unfinished_line_is_no_row_and_is_cut_off(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append({"stage": "a", "value": float("inf"), "text": "τ"})
    journal.close()
    with open(tmp_path / NAME, "ab") as file:
        file.write(b'{"stage": "b", "val')
    assert read_rows([tmp_path]) == [{"stage": "a", "value": "inf", "text": "τ"}]
    journal = Journal(tmp_path)
    journal.append({"stage": "c"})
    journal.close()
    assert [row["stage"] for row in read_rows([tmp_path / NAME])] == ["a", "c"]


def test_asked_to_end_it_prints_what_it_has(tmp_path: Path) -> None:
    run = subprocess.Popen(
        [*COMMAND, "facts", *ON_CPU, "--output-dir", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    while not (tmp_path / NAME).exists() or not read_rows([tmp_path]):
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    printed, _ = run.communicate(timeout=60)
    assert run.returncode == 143
    assert printed == "no stage has ended\n"
    assert read_rows([tmp_path])[-1] == {"stage": "run", "event": "stopped"}


def test_calls_in_processes_of_their_own_end_or_say_why_not() -> None:
    two = replace(PLACE, num_jobs=2)
    answers = {a.argument: a.result for a in in_processes(two, operator.is_not, [1, 2, 3])}
    assert answers == {1: True, 2: True, 3: True}
    (answer,) = in_processes(two, operator.getitem, [7])
    assert (answer.argument, answer.status) == (7, "failed")
    assert answer.detail.startswith("TypeError: 'Place' object")


CALLS = """
import os, time

def dies(place, argument):
    os.kill(os.getpid(), 9)

def hangs(place, argument):
    time.sleep(600)
"""


def test_a_call_without_an_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "calls.py").write_text(CALLS)
    monkeypatch.syspath_prepend(tmp_path)
    calls = importlib.import_module("calls")
    two = replace(PLACE, num_jobs=2)
    died = sorted(in_processes(two, calls.dies, [1, 2, 3]), key=lambda answer: answer.argument)
    assert [(a.argument, a.status, a.detail) for a in died] == [
        (k, "died", "exit code -9") for k in (1, 2, 3)
    ]
    late = replace(two, deadline=time.time() + 0.1)
    for place in (late, replace(late, num_jobs=1, deadline=0)):
        found = list(in_processes(place, calls.hangs, [1, 2, 3]))
        assert {(a.argument, a.status) for a in found} == {(k, "not reached") for k in (1, 2, 3)}
    monkeypatch.setattr(processes, "SILENCE_S", 0.1)
    (hung,) = in_processes(two, calls.hangs, [1])
    assert (hung.argument, hung.status) == (1, "hung")


FLOOD = """
import os, time
from pathlib import Path

def items(place):
    return {"log": lambda: log(Path(place.folder, "log.txt")), "rows": rows}

def log(path):
    for _ in range(200):
        print("x" * 100_000)
    given_up_at = time.time() + 10
    while path.stat().st_size >= 16 << 20 and time.time() < given_up_at:
        time.sleep(0.02)
    yield {"log_bytes": path.stat().st_size}

def rows():
    for _ in range(20):
        yield {"text": "x" * 1_000_000}
"""


def test_no_file_reaches_16_mib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flood.py").write_text(FLOOD)
    rows = run_faulty(tmp_path, monkeypatch, Stage("flood", 60, module="flood"))
    (log_bytes,) = [row["log_bytes"] for row in rows if "log_bytes" in row]
    assert log_bytes < 16 << 20 and (tmp_path / NAME).stat().st_size < 16 << 20
    assert len([row for row in rows if "text" in row]) == 15
    assert rows[-1]["counts"] == {"ok": 2}
    assert "FAILED flood: rows.jsonl is full: rows after 15 MiB" in summary(rows)


def test_a_run_is_judged_by_its_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(signal, "signal", lambda *given: None)
    (tmp_path / "damaged.whl").write_bytes(b"PK")
    options = ["--device", "cpu", "--output-dir", str(tmp_path / "runs")]
    parser = gpu_check._make_parser()
    assert gpu_check.run(parser.parse_args([*options, "--wheels", str(tmp_path)]), []) == 1
    page = (tmp_path / "runs" / "summary.txt").read_text()
    assert "FAILED run: damaged.whl: BadZipFile: File is not a zip file" in page
    assert gpu_check.run(parser.parse_args(options), []) == 0
    assert "FAILED" not in (tmp_path / "runs" / "summary.txt").read_text()


def test_the_summary_is_of_the_last_run_of_each_stage() -> None:
    begin: Row = {"stage": "run", "argv": []}
    rates = [{"stage": "facts", "rate": "copy", "value": v, "unit": "GB/s"} for v in (1.0, 2.0)]
    failed = {"stage": "tiles", "item": "forward", "event": "end", "status": "failed"}
    text = summary([begin, rates[0], failed, begin, rates[1]])
    assert "copy: 2 GB/s" in text and "copy: 1 GB/s" not in text
    assert "FAILED tiles: forward" in text


def test_a_card_without_nvidia_smi_has_an_origin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    origin = gpu_check._origin("cuda")
    assert (origin["gpu"], origin["driver"]) == ("unknown GPU", "not here")


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


# --- the stages' own checks must be able to say no


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
    assert modes[-1] == "default" and modes.count("error") == 4


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


def test_the_summary_is_a_page_however_much_failed() -> None:
    rows: list[Row] = [
        {
            "stage": "cases",
            "item": "ragged",
            "event": "end",
            "status": "failed",
            "detail": "x" * 300,
        }
    ] * 500
    rows.append(
        {"stage": "facts", "item": "copies", "rate": "copy", "value": 3000.0, "unit": "GB/s"}
    )
    text = summary(rows)
    assert len(text) <= LIMIT
    assert "more in rows.jsonl" in text and text.endswith("copy: 3e+03 GB/s")


def test_the_rehearsal_finds_a_launch_that_must_not_ship(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compiled(sources: list[Source], num_jobs: int) -> list[Compiled]:
        return [
            Compiled(
                **{name: getattr(s, name) for name in TOLD_APART},
                **{"kernel": "", "num_warps": 4, "num_stages": 2, "fingerprint": ""},
                **{"triton": "3.6.0", "registers": 255, "spilled_bytes": 8 * (spilling in s.label)},
            )
            for s in sources
        ]

    monkeypatch.setattr(rehearse, "compile_all", compiled)
    monkeypatch.setattr(gpu_codegen, "GOALS", {})
    tiles = [len(backend.tiles(phase)) for phase in backend.PAIR_KERNELS]
    assert all(30 <= count <= 40 for count in tiles)
    # A tile that spills is slow; a launch that does must not ship.
    spilling = " in "
    assert gpu_check.main(["rehearse", "--dims", "128"]) == 0
    assert f"and {sum(tiles)} tiles compiled for sm_90, 0 faults" in capsys.readouterr().out
    spilling = "prepare"
    assert gpu_check.main(["rehearse", "--dims", "128"]) == 1
    assert "FAULT: prepare, bfloat16, D=128: spills 8 bytes" in capsys.readouterr().out


# --- the report


def canned() -> list[Row]:
    """What a run on a card might have found; the numbers are invented."""
    origin = {"gpu": "NVIDIA H200", "driver": "580.1", "torch": "2.11.0", "triton": "3.6.0"}
    origin |= {"python": "3.12.3", "supcon_kernels": "0.1.0", "commit": "abc", "dirty": "no"}
    origin |= {"date": "2026-12-01", "num_threads": "16", "cpu": "a CPU", "numpy": "2.5"}
    rows: list[Row] = [{"stage": "run", **origin}]
    rates = {"bfloat16 product": (790.0, "TFLOP/s"), "exponentials": (4.0, "T/s")}
    rows += [{"stage": "facts", "rate": n, "value": v, "unit": u} for n, (v, u) in rates.items()]
    for num_rows, time_ms in ((8192, 0.2), (32768, 2.0)):
        for provider, factor in (("dense", 10.0), ("supcon_kernels[triton]", 1.0)):
            row: Row = {"stage": "speed", "provider": provider, "num_rows": num_rows, "dim": 128}
            row |= {"num_cols": 0, "num_classes": 10, "dtype": "bfloat16", "is_ahead": True}
            row |= {f"{p}_ms": factor * time_ms for p in ("both", "q25", "q75", "eager", "graph")}
            row |= {f"{p}_ms": factor * time_ms / 2 for p in ("forward", "backward")}
            row |= {"q25_ms": 0.9 * row["q25_ms"], "both_tflops": 400.0, "both_share": 0.506}
            row |= {"launches": 9.0, "peak_mib": factor * num_rows / 1000}
            row["kernels"] = [{"kernel": "_forward_kernel", "launches": 1.0, "us": 70.0}]
            rows.append(row)
    tile = {
        "stage": "tiles",
        "phase": "forward",
        "num_rows": 8192,
        "tile": "128×64",
        "tflops": 410.0,
    }
    rows.append({**tile, "kernel_ms": 0.1, "is_shipped": True})
    rows.append(
        {"stage": "cases", "item": "ragged", "case": "ragged", "status": "ok", "ratio": 0.3}
    )
    end = {"stage": "behaviour", "item": "the same bits three times, bfloat16", "event": "end"}
    return [*rows, {**end, "status": "ok", "detail": ""}]


def test_rows_become_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "gpu_h200.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in canned()))
    blank = "<!-- {0}:begin -->\n\n<!-- {0}:end -->\n"
    readme, document = tmp_path / "README.md", tmp_path / "gpu.md"
    readme.write_text(blank.format("gpu_speed"))
    document.write_text(blank.format("gpu_measured"))
    options = ["--readme", str(readme), "--docs", str(tmp_path), "--pictures", str(tmp_path)]
    run = ["report", str(rows), *options]
    assert gpu_check.main([*run, "--check"]) == 1
    assert "STALE" in capsys.readouterr().err and "dense" not in readme.read_text()
    assert gpu_check.main(run) == 0
    assert gpu_check.main([*run, "--check"]) == 0
    text = readme.read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| 8192 ")]
    assert [cell.strip() for cell in line.split("|")[2:5]] == ["2 (1.8–2)", "0.2 (0.18–0.2)", "51%"]
    assert (
        "NVIDIA H200, driver 580.1, torch 2.11.0, Triton 3.6.0" in text and "gpu_h200.png" in text
    )
    assert (tmp_path / "gpu_h200.png").stat().st_size > 10_000
    text = document.read_text()
    for part in ("bfloat16 product 790 TFLOP/s", "Beside the model", "`_forward_kernel`", "128×64"):
        assert part in text
    assert "1 ok" in text and "- behaviour: the same bits three times, bfloat16" in text
    # Without rows there is nothing to say of a GPU.
    empty = ["report", *options, str(tmp_path / "none.jsonl")]
    (tmp_path / "none.jsonl").write_text("")
    assert gpu_check.main(empty) == 0
    assert report.NOT_MEASURED in document.read_text() and "H200" not in readme.read_text()
