"""The device that a process computes on, and how long it waits for others."""

from dataclasses import dataclass
from typing import Literal

import torch

from run.errors import UserError
from run.rules import out_of_range

Device = Literal["auto", "cpu", "cuda", "mps"]


@dataclass
class DeviceOptions:
    """Devices and processes.

    Args:
        device: auto: cuda if available, then mps, then cpu. Each of several processes uses its own
            GPU.
        timeout_minutes: Minutes that a process waits for another before it ends with an error. A
            download of the data set must be shorter.
    """

    device: Device = "auto"
    timeout_minutes: float = 10.0

    def mistakes(self) -> list[str]:
        """What is out of range, one sentence each."""
        return out_of_range(self, greater_than_0=("timeout_minutes",))


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
