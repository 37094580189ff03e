"""Settings of these tests: no network, one thread, train/ and the test fixtures on the path."""

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before the libraries are imported.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / "train"), str(ROOT / "tests")]
# The tensors are small: a team of threads costs more than it brings.
torch.set_num_threads(1)


@pytest.fixture
def run_example(tmp_path, monkeypatch) -> Callable[[str], dict[str, Any]]:
    """Run docs/examples/NAME.py in an empty folder; returns its names."""
    monkeypatch.chdir(tmp_path)

    def run(name: str) -> dict[str, Any]:
        path = ROOT / "docs" / "examples" / f"{name}.py"
        with torch.random.fork_rng():
            return runpy.run_path(str(path), run_name="__main__")

    return run
