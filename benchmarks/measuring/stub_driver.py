"""A CUDA driver that does nothing: Triton compiles for an H100 and launches into the void.

So that the host's part of a launch, Triton's own launcher included, can be timed where there is no
GPU. Tensors are on the CPU; what kernels would write is never written.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from pathlib import Path
from typing import Any

NUM_MULTIPROCESSORS = 132
# Every function of the driver that Triton names; those that tell something, tell a large number.
_SILENT = """cuCtxGetCurrent cuCtxGetLimit cuCtxSetCurrent cuCtxSetLimit cuDeviceGet cuCtxGetDevice
cuDevicePrimaryCtxRetain cuFuncSetAttribute cuFuncSetCacheConfig cuGetErrorString cuLaunchKernelEx
cuLaunchKernel cuModuleGetFunction cuModuleLoadData cuModuleUnload cuOccupancyMaxActiveClusters
cuTensorMapEncodeIm2col cuTensorMapEncodeTiled"""
_TELLING = "cuDeviceGetAttribute cuFuncGetAttribute cuDriverGetVersion"


def install() -> None:
    """Make Triton use it in this process."""
    import torch
    from triton import knobs
    from triton.runtime import driver

    knobs.nvidia.libcuda_path = str(_library())
    from triton.backends.nvidia.driver import CudaDriver

    torch.cuda.is_available = lambda: False  # it would ask the stub
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    stub: Any = CudaDriver()
    stub.get_current_device = lambda: 0
    stub.get_current_stream = lambda device: 0
    stub.get_device_capability = lambda device=0: (9, 0)
    driver.set_active(stub)


def _library() -> Path:
    """The folder of a libcuda.so.1 that is loaded already."""
    code = [f"int {name}(void) {{ return 0; }}" for name in _SILENT.split()]
    code += [
        f"int {name}(int *value) {{ *value = 227 * 1024; return 0; }}" for name in _TELLING.split()
    ]
    code.append(
        "int cuPointerGetAttribute(void **to, int what, void *from) { *to = from; return 0; }"
    )
    folder = Path(tempfile.mkdtemp())
    (folder / "stub.c").write_text("\n".join(code))
    library = folder / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), "stub.c"]
    subprocess.run(command, cwd=folder, check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return folder
