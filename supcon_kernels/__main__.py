"""``python -m supcon_kernels``: versions, the device, and which backends are ready here."""

from __future__ import annotations

import platform

import torch

import supcon_kernels
from supcon_kernels.backends import native, triton


def report() -> str:
    """What a bug report needs: versions, the device, and each backend with "ready" or why not."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    lines = [
        f"supcon_kernels {supcon_kernels.__version__}",
        f"torch          {torch.__version__}",
        f"python         {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"cpu            {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        f"gpu            {device}",
        "",
        "backends, best first",
    ]
    for name, reason in supcon_kernels.available_backends().items():
        detail = f" ({native.description()})" if name == "native" and reason is None else ""
        lines.append(f"  {name:<12} {reason or 'ready'}{detail}")
        if name == "triton":
            lines.append(f"  {'':<12} {triton.description()}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
