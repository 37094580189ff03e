"""A few calls under compute-sanitizer, where it is installed: out of bounds, and never written."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator

from gpu.counters import find_tool
from gpu.place import Items, Place, Row

TOOLS = ("memcheck", "initcheck")


def items(place: Place) -> Items:
    place.needs_cuda()
    return {tool: functools.partial(_watch, tool) for tool in TOOLS}


def _watch(tool: str) -> Iterator[Row]:
    sanitizer = find_tool("compute-sanitizer")
    script = "from gpu.sanitizers import watched; watched()"
    # Without torch's cache of blocks a step beyond a tensor is a step beyond its allocation.
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "1", sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    errors = re.search(r"ERROR SUMMARY: (\d+) error", done.stdout)
    in_ours = re.findall(r"at (_\w+_kernel)", done.stdout)
    yield {
        "tool": tool,
        "errors": int(errors.group(1)) if errors else None,
        "in_our_kernels": sorted(set(in_ours)),
        "output": done.stdout[:600] if done.returncode else "",
    }
    if done.returncode:
        raise RuntimeError(f"{tool}: exit code {done.returncode}: {done.stdout.strip()[-200:]}")


def watched() -> None:
    """Every loss once in bfloat16, and the default in float32."""
    from cases import VARIANTS
    from gpu.facts import smoke_call

    place = Place()
    for call in [("float32", *VARIANTS[0]), *(("bfloat16", *variant) for variant in VARIANTS)]:
        found = smoke_call(place, call)
        assert found["ratio"] <= 1, f"{call}: {found}"
