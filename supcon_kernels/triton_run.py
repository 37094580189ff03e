"""Compiles what ``triton_launch`` plans, once for each device, and launches it.

A launch says all that decides what is compiled, so that no argument's value ever does: sizes may
change from call to call, and what benchmarks/gpu_codegen.py reads is what runs.
"""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

import os
from typing import Any

import torch

from supcon_kernels.triton_launch import Launch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
# By code and index of the device: launches of other sizes share what has been compiled.
_compiled: dict[tuple[object, ...], tuple[Any, list[str]]] = {}


def run(launch: Launch, device: torch.device, arguments: dict[str, Any]) -> None:
    """Launch on the current stream of ``device``, which is the current device.

    Args:
        launch: what is launched.
        device: of every tensor.
        arguments: the runtime arguments by name, and maybe others.

    Raises:
        RuntimeError: a CUDA graph is being captured, and the kernel is not compiled yet.
    """
    if INTERPRETED:
        from supcon_kernels import kernels  # only here: importing it needs triton

        kernel = getattr(kernels, launch.kernel)
        given = {name: arguments[name] for name in launch.signature}
        kernel[launch.grid](**given, **launch.constexprs, **launch.options)
        return
    loaded = launch.loaded.get(device.index)
    if loaded is None:
        key = (launch.code, device.index)
        if key not in _compiled:
            _compiled[key] = _compile(launch)
        compiled, order = _compiled[key]
        loaded = launch.loaded[device.index] = compiled[launch.grid], order
    start, order = loaded
    start(*map(arguments.get, order))


def source_of(launch: Launch, kernel: Any) -> Any:
    """What the compiler is given of a kernel."""
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: launch.signature.get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible_by_16}
    return ASTSource(kernel, signature, dict(launch.constexprs), aligned)


def _compile(launch: Launch) -> tuple[Any, list[str]]:
    """The kernel, for the current device, and the names of its arguments in order."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "supcon_loss compiles its kernels in the first call of a kind, which cannot be captured "
            "in a CUDA graph: make such a call, with its backward, before the capture"
        )
    import triton

    from supcon_kernels import kernels

    kernel = getattr(kernels, launch.kernel)
    compiled = triton.compile(source_of(launch, kernel), options=launch.options)
    return compiled, kernel.arg_names
