"""The scripts of train/ as processes, several at once, and what machine and commit they ran on."""

import ctypes
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock
from typing import IO, Any

import torch

from run.errors import UserError
from run.requeue import EXIT_CODE

TRAIN = Path(__file__).resolve().parents[1]
# Looked up before a process is forked.
PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
PARENT_DEATH_SIGNAL = 1


class _Running:
    """The processes that run. Once they were killed none is started any more."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.processes: set[subprocess.Popen[bytes]] = set()
        self.killed = False

    def call(self, command: list[str], output: IO[str]) -> int:
        """As subprocess.call."""
        with self.lock:
            refuse_if_stopped()
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                preexec_fn=_end_with_parent if PRCTL else None,
            )
            self.processes.add(process)
        try:
            return process.wait()
        finally:
            self.processes.discard(process)

    def kill(self) -> None:
        with self.lock:
            self.killed = True
            for process in list(self.processes):
                process.kill()


_running = _Running()


def refuse_if_stopped() -> None:
    """Begin nothing after the processes were killed.

    Raises:
        UserError: they were.
    """
    if _running.killed:
        raise UserError("stopped")


@contextmanager
def killed_on_error() -> Iterator[None]:
    """Kill what `start` has started in any thread when the block is left by an error or by Ctrl-C."""
    _running.killed = False
    try:
        yield
    except BaseException:
        _running.kill()
        raise


def share_threads(num_runs: int) -> None:
    """Give this process, and those that it starts, their share of the CPU threads."""
    threads = max(torch.get_num_threads() // num_runs, 1)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)


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
        code = _running.call([sys.executable, str(TRAIN / script), *words], output)
    if code == EXIT_CODE:
        raise SystemExit(EXIT_CODE)
    if code != 0:
        lines = [line for line in (folder / "output.txt").read_text().splitlines() if line.strip()]
        raise UserError(f"{script} ended with {code}: {lines[-1] if lines else ''} ({folder})")


def _end_with_parent() -> None:
    """Have Linux kill this process when its parent ends: else a killed paper.py left a run behind."""
    assert PRCTL is not None
    PRCTL(PARENT_DEATH_SIGNAL, signal.SIGKILL)


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
