"""``python -m supcon_kernels``: versions, the device, and whether each backend works here."""

from __future__ import annotations

import platform
import sys

import torch
from torch import Tensor

import supcon_kernels
from supcon_kernels import supcon_loss
from supcon_kernels.backends import native, triton

# Of loss and gradient, relative to the largest element: float32's rounding, with room.
TOLERANCE = 1e-4


def report() -> tuple[str, bool]:
    """What a bug report needs, and whether every backend that is ready computes what it should."""
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
    all_right = True
    for name, reason in supcon_kernels.available_backends().items():
        wrong = "" if reason else check(name)
        all_right = all_right and not wrong
        detail = f" ({native.description()})" if name == "native" and reason is None else ""
        lines.append(f"  {name:<12} {reason or wrong or 'ready, checked'}{detail}")
        if name == "triton":
            lines.append(f"  {'':<12} {triton.description()}")
    return "\n".join(lines), all_right


def check(backend: str) -> str:
    """Compare a small loss and its gradient with the formula in float64; what is wrong, or nothing."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    features = torch.randn(96, 32, generator=torch.Generator().manual_seed(0))
    labels = (torch.arange(96) % 7).to(device)
    try:
        found = _loss_and_gradient(features.to(device), labels, backend)
    except Exception as error:  # whatever it is, the report goes on and names it
        return f"FAILED: {type(error).__name__}: {error}".splitlines()[0]
    truth = _loss_and_gradient(features.double(), labels.cpu(), "reference")
    errors = [
        float((a.cpu().double() - b).abs().max() / b.abs().max()) for a, b in zip(found, truth)
    ]
    if max(errors) <= TOLERANCE:  # NaN is not
        return ""
    return f"WRONG: its loss is off by {errors[0]:.1e}, its gradient by {errors[1]:.1e}"


def _loss_and_gradient(features: Tensor, labels: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    features.requires_grad_()
    loss = supcon_loss(features, labels, temperature=0.1, group="local", backend=backend)
    return loss.detach(), torch.autograd.grad(loss, features)[0]


if __name__ == "__main__":
    text, works = report()
    print(text)
    sys.exit(0 if works else 1)
