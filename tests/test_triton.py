"""The Triton backend where there is no GPU: its numbers by an interpreter, and why it is not there."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
import sys
import types

import pytest
import torch

from supcon_kernels import available_backends, supcon_loss, triton_call, triton_launch, triton_run
from supcon_kernels.backends import triton as backend

NO_TRITON = "triton is not installed"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason=NO_TRITON)
def test_every_case_under_the_interpreter():
    folder = pathlib.Path(__file__).parent
    tests = [str(folder / f"interpreted_{name}.py") for name in ("triton", "wide_rows")]
    # In two processes: this is the longest test, and may be the last, beside an idle one.
    command = [sys.executable, "-m", "pytest", "-q", "-n2", "--dist=load"]
    command += ["-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr


def test_it_says_why_it_is_not_there(monkeypatch):
    monkeypatch.setattr(backend, "_lacks", None)
    monkeypatch.setattr(backend, "_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert available_backends()["triton"] == "there is no CUDA device."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    card = types.SimpleNamespace(name="Tesla T4", major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "Tesla T4 is of compute capability 7.5" in available_backends()["triton"]
    card.major = 8
    assert available_backends()["triton"] is None
    with pytest.raises(ValueError, match="the features are on cpu, and it runs on CUDA"):
        supcon_loss(torch.randn(4, 3), torch.arange(4), backend="triton")


def test_the_workspace_is_a_number_of_mib():
    assert triton_call._workspace_bytes("3") == 3 * 2**20
    for wrong in ("0", "-1", "big", "1.5"):
        with pytest.raises(ValueError, match="SUPCON_KERNELS_WORKSPACE_MIB must be a whole number"):
            triton_call._workspace_bytes(wrong)


def test_it_says_what_the_installation_lacks(monkeypatch):
    monkeypatch.setattr(backend, "_INTERPRETED", False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.4.0")
    assert backend._not_installed() is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "built for AMD's" in backend._not_installed()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.3.1")
    assert backend._not_installed() == "triton is of version 3.3.1, and it needs 3.4 or newer."
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert backend._not_installed() == "triton is not installed: pip install triton."
    monkeypatch.setattr(backend, "_lacks", backend._not_installed())
    assert available_backends()["triton"] == "triton is not installed: pip install triton."
    with pytest.raises(ValueError, match="triton is not installed"):
        supcon_loss(torch.randn(4, 3), torch.arange(4), backend="triton")


def test_a_capture_is_refused_where_a_kernel_is_not_compiled_yet(monkeypatch):
    launch = triton_launch.Launch("_loss_kernel", {"loss_ptr": "*fp32"}, {}, (), 4, 1, (1, 1, 1))
    monkeypatch.setattr(triton_run, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(
        RuntimeError, match="make such a call, with its backward, before the capture"
    ):
        triton_run.run(launch, torch.device("cuda", 0), {"loss_ptr": torch.zeros(())})
    assert not launch.loaded


def test_a_launch_is_compiled_once_for_all_sizes(monkeypatch):
    compiled, launched = [], []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments: launched.append((grid, arguments))

    def compile_it(launch):
        compiled.append(launch.code)
        return Kernel(), ["num_rows", "ROWS", "loss_ptr"]

    monkeypatch.setattr(triton_run, "INTERPRETED", False)
    monkeypatch.setattr(triton_run, "_compile", compile_it)
    monkeypatch.setattr(triton_run, "_compiled", {})
    for num_programs in (1, 1, 2):
        grid = (num_programs, 1, 1)
        kind = {"loss_ptr": "*fp32", "num_rows": "i32"}
        launch = triton_launch.Launch("_loss_kernel", kind, {"ROWS": 64}, (), 4, 1, grid)
        for index in (0, 1):
            device = torch.device("cuda", index)
            triton_run.run(launch, device, {"loss_ptr": "loss", "num_rows": 5})
            assert launched[-1] == (grid, (5, None, "loss"))
    assert len(compiled) == 2  # once for each device


def test_without_triton_the_package_works():
    code = """
import sys
sys.modules["triton"] = None  # importing it fails
import torch, supcon_kernels
assert "triton is not installed" in supcon_kernels.available_backends()["triton"]
print(supcon_kernels.supcon_loss(torch.eye(4), torch.arange(4) // 2))
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


def test_using_the_package_does_not_import_the_kernels():
    code = """
import sys, torch, supcon_kernels
supcon_kernels.supcon_loss(torch.eye(4), torch.arange(4) // 2)
assert "supcon_kernels.kernels" not in sys.modules and "triton" not in sys.modules
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
