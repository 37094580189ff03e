"""What the card is, what it can do, and whether anything works: versions, clocks, rates, first calls."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch

from gpu.journal import read_rows
from gpu.place import Items, Place, Row
from gpu.processes import in_processes
from gpu.timing import time_interleaved
from measuring.machine import describe_machine, query_nvidia_smi

PACKAGES = (
    *("triton", "numpy", "kornia", "jsonargparse", "webdataset", "timm", "torchmetrics"),
    *("safetensors", "scikit-learn", "pytest", "memeff", "inf-cl", "siglip-kernel"),
)
SMI_FIELDS = (
    "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,power.draw,"
    "temperature.gpu,clocks_event_reasons.active"
)
DTYPES = ("float32", "bfloat16", "float16")
GIB = 1 << 30


def items(place: Place) -> Items:
    return {
        "versions": lambda: _versions(place),
        "products": lambda: _products(place),
        "exponentials": lambda: _exponentials(place),
        "copies": lambda: _copies(place),
        "smoke": lambda: _smoke(place),
    }


def _versions(place: Place) -> Iterator[Row]:
    yield {"machine": describe_machine(place.device), "packages": dict(map(_version, PACKAGES))}
    if place.device == "cuda":
        card = torch.cuda.get_device_properties()
        yield {
            "multiprocessors": card.multi_processor_count,
            "capability": f"{card.major}.{card.minor}",
            "memory_gib": card.total_memory / GIB,
            "l2_mib": card.L2_cache_size / (1 << 20),
            "cuda": torch.version.cuda,
            "nvidia_smi": query_nvidia_smi(SMI_FIELDS),
        }


def _version(package: str) -> tuple[str, str]:
    try:
        return package, metadata.version(package)
    except metadata.PackageNotFoundError:
        found = importlib.util.find_spec(package.replace("-", "_"))
        return package, "version unknown" if found else "not here"


# --- the first calls


def _smoke(place: Place) -> Iterator[Row]:
    """Every loss in every dtype against float64, each in a process of its own."""
    from cases import VARIANTS

    calls = [(dtype, *variant) for dtype in DTYPES for variant in VARIANTS]
    for answer in in_processes(place, smoke_call, calls):
        is_wrong = answer.status == "ok" and not answer.result["ratio"] <= 1
        yield {
            "call": "/".join(answer.argument),
            "status": "wrong" if is_wrong else answer.status,
            "detail": answer.detail,
            "seconds": answer.seconds,
            **(answer.result or {}),
        }


def smoke_call(place: Place, call: tuple[str, str, str]) -> Row:
    """Errors of one small call, and the largest as a share of its bound."""
    from cases import by_id
    from compare import deviations
    from gpu.cases import moved_loss

    dtype, summation, denominator = call
    arguments = {**by_id("ragged").arguments(), "summation": summation, "denominator": denominator}
    found = list(deviations(moved_loss(place), arguments, getattr(torch, dtype)))
    return {
        "errors": {name: [error, bound] for name, error, bound in found},
        "ratio": max(error / bound for _, error, bound in found),
    }


# --- the rates


def _products(place: Place) -> Iterator[Row]:
    """Large products of random numbers: zeros would go faster than what is measured with them."""
    sizes = ((256, 256, 256),) if place.is_tiny else ((8192, 8192, 8192), (16384, 16384, 4096))
    for dtype, is_tf32 in (("bfloat16", False), ("float32", True), ("float32", False)):
        torch.backends.cuda.matmul.allow_tf32 = is_tf32
        best = 0.0
        for rows, cols, depth in sizes:
            left = torch.randn(rows, depth, device=place.device).to(getattr(torch, dtype))
            right = torch.randn(depth, cols, device=place.device).to(getattr(torch, dtype))
            laps = _time(place, functools.partial(torch.mm, left, right))
            best = max(best, 2e-9 * rows * cols * depth / laps)
        kind = "tf32" if is_tf32 else dtype
        yield {"rate": f"{kind} product", "value": best, "unit": "TFLOP/s"}
    if place.device == "cuda":
        yield {"nvidia_smi": query_nvidia_smi(SMI_FIELDS)}


def _exponentials(place: Place) -> Iterator[Row]:
    """Of registers, in chains long enough that nothing else counts."""
    if place.device == "cuda":
        from gpu.rates import exponentials

        num, run = exponentials()
    else:
        x = torch.rand(1 << 16)
        num, run = x.numel(), x.exp2_
    yield {"rate": "exponentials", "value": 1e-9 * num / _time(place, run), "unit": "T/s"}


def _copies(place: Place) -> Iterator[Row]:
    """Bytes read and written, of more than the L2 cache holds."""
    num_bytes = 1 << 20 if place.is_tiny else 2 * GIB
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    run = functools.partial(target.copy_, source)
    yield {"rate": "copy", "value": 2e-6 * num_bytes / _time(place, run), "unit": "GB/s"}


def _time(place: Place, run: Callable[[], object]) -> float:
    budget_s = 0.0 if place.is_tiny else 1.0
    return time_interleaved({"": lambda mark: run()}, place.device, budget_s)[""].median


def measured_rates(folder: Path) -> dict[str, float]:
    """The rates that the journal of a folder holds, by name."""
    return rates_of(read_rows([folder]))


def rates_of(rows: list[Row]) -> dict[str, float]:
    return {row["rate"]: row["value"] for row in rows if "rate" in row}
