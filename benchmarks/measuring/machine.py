"""What a row was measured on: hardware, versions, and the state of the repository."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS_DO_NOT_COUNT = ":!benchmarks/results"
ISA_FLAGS = re.compile(r"sse4_2|avx\w*|fma|f16c|amx\w*|neon|asimd\w*|sve\w*|bf16|i8mm")


def describe_machine(device: str) -> dict[str, str]:
    """Everything that a reader needs to judge or repeat a row, as CSV columns."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": _cpu_field("model name") or platform.processor() or platform.machine(),
        "num_cores": str(_num_cores()),
        "num_threads": str(torch.get_num_threads()),
        "isa": " ".join(
            flag
            for flag in (_cpu_field("flags") or _cpu_field("Features")).split()
            if ISA_FLAGS.fullmatch(flag)
        ),
        "load_at_start": f"{os.getloadavg()[0]:.2f}",
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "",
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "supcon_kernels": _supcon_kernels_version(),
        "pytorch_metric_learning": _version("pytorch-metric-learning"),
        "commit": _git("rev-parse", "--short=12", "HEAD") or "unknown",
        "dirty": "yes" if _git("status", "--porcelain", "--", ".", RESULTS_DO_NOT_COUNT) else "no",
    }


def query_nvidia_smi(fields: str) -> dict[str, str]:
    """Comma-separated fields of the first card, by name; or what came instead of them."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as failure:
        return {"output": f"not here: {failure}"}
    names, values = fields.split(","), done.stdout.strip().split(", ")
    return dict(zip(names, values)) if len(values) == len(names) else {"output": done.stdout[:200]}


def available_memory_bytes(device: str) -> int:
    """Memory that a provider may still take on the device."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(text.split("MemAvailable:")[1].split()[0]) * 1024


def _num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_field(name: str) -> str:
    """One field of the first CPU in /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _supcon_kernels_version() -> str:
    """Of what is imported, which need not be what is installed."""
    try:
        from supcon_kernels import __version__
    except ModuleNotFoundError:
        return "not installed"
    return __version__


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
