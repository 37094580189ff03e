"""What the runner of the GPU stages makes of parts that fail, hang, die or say too much."""

from __future__ import annotations

import importlib
import operator
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gpu import processes
from gpu.journal import NAME, Journal, read_rows
from gpu.place import Place, Row
from gpu.processes import in_processes
from gpu.runner import Stage, run_stages
from gpu.summary import summary

BENCHMARKS = Path(__file__).parents[1]
PLACE = Place(device="cpu", backend="tiled", is_tiny=True)

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
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(BENCHMARKS)]))
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
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(BENCHMARKS)]))
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
