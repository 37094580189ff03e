"""What an installation says of itself: a missing kernel, and backends that compute wrongly."""

import subprocess
import sys

import pytest

from supcon_kernels import __main__ as report
from supcon_kernels.backends import native, tiled

WITHOUT_CORE = """
import sys
sys.modules["_supcon_kernels"] = None  # as where no compiler was found
import torch
from supcon_kernels import supcon_loss
print(supcon_loss(torch.ones(4, 2), torch.tensor([0, 0, 1, 1])).isfinite().item())
"""


def test_a_missing_kernel_is_said_once_at_import():
    command = [sys.executable, "-c", WITHOUT_CORE]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
    assert done.stderr.count("the compiled core is not there") == 1
    assert "several times slower" in done.stderr and "install supcon-kernels again" in done.stderr


def test_every_ready_backend_is_checked():
    text, works = report.report()
    assert works and text.count("ready, checked") == 3  # the machine of the tests has no GPU


@pytest.mark.parametrize("broken", ["wrong", "raising"])
def test_a_broken_backend_is_named(broken, monkeypatch):
    forward = tiled.forward

    def wrong(*call):
        if broken == "raising":
            raise RuntimeError("the kernel broke")
        results = forward(*call)
        return results._replace(loss=results.loss + 1)

    monkeypatch.setattr(tiled, "forward", wrong)
    text, works = report.report()
    assert not works
    line = next(line for line in text.splitlines() if "tiled" in line)
    assert ("WRONG: its loss is off by" if broken == "wrong" else "FAILED: RuntimeError") in line
    assert native.unavailable() is not None or "native       ready, checked" in text
