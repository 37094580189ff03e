"""The generated parts of README and docs/results.md."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import update_documents
from measuring.machine import REPOSITORY


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """README and the page of results, to be written to."""
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/results.md"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    monkeypatch.setattr(update_documents, "REPOSITORY", tmp_path)
    monkeypatch.setattr(update_documents, "DOCS", tmp_path / "docs")
    return tmp_path


def call(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr("sys.argv", ["update_documents.py", *options])
    return update_documents.main()


def test_the_committed_documents_say_what_the_rows_say(monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, "--check") == 0


def test_a_changed_number_is_found_and_mended(
    copies: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = copies / "docs" / "results.md"
    right = page.read_text()
    changed = right.replace("0.99", "0.98")
    assert changed != right
    page.write_text(changed)
    assert call(monkeypatch, "--check") == 1
    assert page.read_text() == changed and "docs/results.md: digits" in capsys.readouterr().err
    assert call(monkeypatch) == 0
    assert page.read_text() == right
