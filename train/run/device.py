"""The device that a process computes on, how exactly, and how long it waits for others."""

import os
from dataclasses import dataclass
from typing import Literal

import torch
import torch.utils.deterministic

from run.errors import UserError
from run.rules import LARGEST, out_of_range

Device = Literal["auto", "cpu", "cuda", "mps"]


@dataclass
class DeviceOptions:
    """Devices and processes.

    Args:
        device: auto: cuda if available, then mps, then cpu. Each of several processes uses its own
            GPU.
        timeout_minutes: Minutes that a process waits for another before it ends with an error. A
            download of the data set must be shorter.
        deterministic: On CUDA, use the deterministic algorithms of cuDNN, cuBLAS and torch, so that a
            resumed run ends with the same weights. Slower. torch warns of an operation that has none.
            A CPU is deterministic without this option.
        tf32: On CUDA, round the float32 inputs of convolutions and matrix products to TF32 (10 bits of
            mantissa). Faster from Ampere on. No effect on bf16 and fp16.
    """

    device: Device = "auto"
    timeout_minutes: float = 10.0
    deterministic: bool = False
    tf32: bool = False

    def mistakes(self) -> list[str]:
        """What is out of range, one sentence each."""
        return out_of_range(
            self, greater_than_0=("timeout_minutes",), at_most={"timeout_minutes": LARGEST}
        )


def gpu_memory(device: torch.device) -> str:
    """The most GPU memory that torch has held, of all there is; empty without CUDA.

    Both are numbers on the host: reading them does not wait for the GPU.
    """
    if device.type != "cuda":
        return ""
    held = torch.cuda.max_memory_reserved(device)
    total = torch.cuda.get_device_properties(device).total_memory
    return f"{held / 2**30:.1f} of {total / 2**30:.1f} GiB"


def pick_device(name: str) -> torch.device:
    """The device of that name; auto: the fastest kind that is there."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind in there if there[kind])
    if not there[name]:
        raise UserError(f"--device {name}: this machine, or this build of torch, has none")
    return torch.device(name)


def set_arithmetic(options: DeviceOptions, device: torch.device) -> None:
    """Have torch compute on CUDA as the options ask; called before anything is computed there."""
    if device.type != "cuda":
        return
    torch.backends.cudnn.deterministic = options.deterministic
    # It takes the fastest of several algorithms, which may be another one at each start.
    torch.backends.cudnn.benchmark = not options.deterministic
    torch.use_deterministic_algorithms(options.deterministic, warn_only=True)
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")
        # No result depends on memory that was not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        print(
            "deterministic: cuDNN, cuBLAS and torch, on the same GPU model and versions; not "
            "deterministic: the operations that torch warns of"
        )
    # Not by fp32_precision, the newer way: torch's compiler and export ask by these, which then raise.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.tf32
