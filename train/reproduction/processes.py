"""The scripts of train/ as processes, and what machine and commit they ran on."""

import ctypes
import json
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from run.errors import UserError
from run.requeue import EXIT_CODE

TRAIN = Path(__file__).resolve().parents[1]
# Loaded before a process is forked.
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PARENT_DEATH_SIGNAL = 1


def start(script: str, folder: Path, **options: Any) -> None:
    """Run a script as a process, which ends with this one; its output goes to the folder.

    Raises:
        UserError: it failed; with its last line.
    """
    words = (
        word
        for name, value in options.items()
        for word in (
            f"--{name}",
            str(value) if isinstance(value, str | Path) else json.dumps(value),
        )
    )
    with open(folder / "output.txt", "a") as output:
        code = subprocess.run(
            [sys.executable, str(TRAIN / script), *words],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            preexec_fn=_end_with_parent if LIBC else None,
        ).returncode
    if code == EXIT_CODE:
        raise SystemExit(EXIT_CODE)
    if code != 0:
        lines = [line for line in (folder / "output.txt").read_text().splitlines() if line.strip()]
        raise UserError(f"{script} ended with {code}: {lines[-1] if lines else ''} ({folder})")


def _end_with_parent() -> None:
    """Have Linux kill this process when its parent ends: else a killed paper.py left a run behind."""
    assert LIBC is not None
    LIBC.prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)


@cache
def machine() -> dict[str, str]:
    """What a result was made with."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=TRAIN, capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f"{torch.get_num_threads()} threads of {_cpu()}"
    return {"commit": commit or "unknown", "hardware": hardware, "torch": str(torch.__version__)}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names: Iterator[str] = (line.split(": ")[1] for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
