"""The command that a card is given, on a CPU: every stage, the rehearsal, how a run is judged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gpu_check
from codegen import kernels
from codegen.kernels import TOLD_APART, Compiled, Source
from gpu import backend, rehearse
from gpu.journal import NAME, read_rows
from gpu.place import Row
from gpu.summary import LIMIT

COMMAND = [sys.executable, str(Path(gpu_check.__file__))]
ON_CPU = ["--device", "cpu", "--backend", "tiled", "--tiny", "--jobs", "1"]


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
    on_cuda = {"counters": 1, "sanitizers": 1, "behaviour": 5, "choices": 1}
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
    assert {row["phase"] for row in rows if "kernel_ms" in row} == set(backend.TILED_KERNELS)
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


def test_each_command_ends_within_nine_minutes() -> None:
    shares = {stage.name: stage.seconds for stage in gpu_check.STAGES}
    first = sum(shares[name] for name in gpu_check.FIRST_COMMAND)
    tiles = shares["tiles"]
    assert max(first, tiles, sum(shares.values()) - first - tiles) <= 540


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


def test_a_card_without_nvidia_smi_has_an_origin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    origin = gpu_check._origin("cuda")
    assert (origin["gpu"], origin["driver"]) == ("unknown GPU", "not here")


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
    monkeypatch.setattr(kernels, "GOALS", {})
    tiles = [len(backend.tiles(phase)) for phase in backend.PAIR_KERNELS]
    assert all(30 <= count <= 50 for count in tiles)
    in_blocks = [
        source
        for dtype in ("bfloat16", "float32")
        for source in backend.sources(dtype, 128, 90, with_tiles=False)
        if source.label.endswith(" in blocks")
    ]
    assert {s.launch.kernel for s in in_blocks} == {"_derivatives_kernel"}
    tiles.append(len(in_blocks))
    # A tile that spills is slow; a launch that does must not ship.
    spilling = " in "
    assert gpu_check.main(["rehearse", "--dims", "128"]) == 0
    assert f"and {sum(tiles)} tiles compiled for sm_90, 0 faults" in capsys.readouterr().out
    spilling = "prepare"
    assert gpu_check.main(["rehearse", "--dims", "128"]) == 1
    assert "FAULT: prepare, bfloat16, D=128: spills 8 bytes" in capsys.readouterr().out
