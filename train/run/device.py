"""The device that --device names."""

import torch

from run.errors import UserError


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
