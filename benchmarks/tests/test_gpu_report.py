"""From the rows of a run on a card to its summary and to documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import gpu_check
from gpu import report
from gpu.place import Row
from gpu.summary import LIMIT, summary


def test_the_summary_is_of_the_last_run_of_each_stage() -> None:
    begin: Row = {"stage": "run", "argv": []}
    rates = [{"stage": "facts", "rate": "copy", "value": v, "unit": "GB/s"} for v in (1.0, 2.0)]
    failed = {"stage": "tiles", "item": "forward", "event": "end", "status": "failed"}
    text = summary([begin, rates[0], failed, begin, rates[1]])
    assert "copy: 2 GB/s" in text and "copy: 1 GB/s" not in text
    assert "FAILED tiles: forward" in text


def test_the_summary_says_what_a_training_step_is_spent_on() -> None:
    row: Row = {"stage": "driver", "loop": "driver_simclr", "over_bare": "0.97"}
    row |= {"images_per_second": "9000", "over_plain": "3.1", "loss_share": "0.01"}
    text = summary([{"stage": "run", "argv": []}, row])
    assert "driver_simclr: 9000 images/s, 0.97 of bare, 3.1 of SupContrast's way, loss 0.01" in text


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
        "dtype": "bfloat16",
        "dim": 128,
        "num_rows": 8192,
        "tile": "128×64",
        "tflops": 410.0,
    }
    rows.append({**tile, "kernel_ms": 0.1, "is_shipped": True})
    rows.append(
        {"stage": "cases", "item": "ragged", "case": "ragged", "status": "ok", "ratio": 0.3}
    )
    loop = {"stage": "driver", "model": "resnet18", "width": "64", "image_size": "28"}
    loop |= {"batch_size": "256", "num_views": "2", "plain_workers": "8", "over_bare": "0.85"}
    rows.append({**loop, "loop": "driver_simclr", "images_per_second": "5609", "loss_share": ".01"})
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
    (line,) = [line for line in text.splitlines() if line.startswith("| 8,192 ")]
    assert [cell.strip() for cell in line.split("|")[2:6]] == ["2", "0.2", "81.9", "8.19"]
    assert (
        "NVIDIA H200, driver 580.1, torch 2.11.0, Triton 3.6.0" in text and "gpu_h200.png" in text
    )
    assert (tmp_path / "gpu_h200.png").stat().st_size > 10_000
    text = document.read_text()
    for part in ("bfloat16 product 790 TFLOP/s", "Beside the model", "`_forward_kernel`", "128×64"):
        assert part in text
    assert "1 ok" in text and "- the same bits three times: bfloat16" in text
    assert "5,609" in text and "85%" in text
    # Without rows there is nothing to say of a GPU.
    empty = ["report", *options, str(tmp_path / "none.jsonl")]
    (tmp_path / "none.jsonl").write_text("")
    assert gpu_check.main(empty) == 0
    assert report.NOT_MEASURED in document.read_text() and "H200" not in readme.read_text()
