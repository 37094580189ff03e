"""Every case of the tests' table in every dtype and loss against float64, on the device.

Memory that nothing has written reads as NaN. A CUDA error costs its case: the next begins in a fresh
process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gpu.place import Items, Place, Row, first_line
from supcon_kernels import supcon_loss

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TINY = ("ragged", "weighted_mask")


def items(place: Place) -> Items:
    from cases import CASES

    # With it, torch fills what torch.empty returns with NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(1)
    chosen = TINY if place.is_tiny else tuple(case.id for case in CASES)
    return {name: functools.partial(_compare, place, name) for name in chosen}


def _compare(place: Place, name: str) -> Iterator[Row]:
    """In each dtype and loss, and once more with a temperature that the host does not read."""
    from cases import VARIANTS

    variants = VARIANTS[:1] if place.is_tiny else VARIANTS
    calls = [(dtype, variant, False) for variant in variants for dtype in DTYPES]
    calls += [(torch.float32, variant, True) for variant in variants]
    for dtype, variant, tau_on_device in calls:
        row: Row = {"case": name, "dtype": str(dtype)[6:], "variant": "/".join(variant)}
        row["tau_on_device"] = tau_on_device
        if place.is_late:
            yield row | {"status": "not reached"}
            continue
        yield row | _found(place, name, dtype, variant, tau_on_device)


def _found(
    place: Place, name: str, dtype: torch.dtype, variant: tuple[str, str], tau_on_device: bool
) -> Row:
    """ok, wrong, failed, or refused where it is not this backend's call; errors beside their bounds."""
    from cases import by_id
    from compare import deviations

    arguments = by_id(name).arguments() | dict(zip(("summation", "denominator"), variant))
    try:
        found = list(deviations(moved_loss(place, tau_on_device), arguments, dtype))
    except ValueError as refusal:
        is_refusal = "cannot take this call" in str(refusal)
        return {"status": "refused" if is_refusal else "failed", "detail": first_line(refusal)}
    except AssertionError as wrong:
        return {"status": "wrong", "detail": first_line(wrong)}
    except Exception as failure:  # Triton's own are not RuntimeErrors
        if place.device == "cuda":
            torch.cuda.synchronize()  # raises where the device is broken: the case ends here
        return {"status": "failed", "detail": first_line(failure)}
    errors = {quantity: [error, bound] for quantity, error, bound in found}
    is_right = all(error <= bound < float("inf") for error, bound in errors.values())
    return {
        "status": "ok" if is_right else "wrong",
        "ratio": max((error / bound for error, bound in errors.values()), default=0.0),
        "errors": errors,
    }


def moved_loss(place: Place, tau_on_device: bool = False) -> Callable[..., Tensor]:
    """The loss with its tensors on the device, the temperature only where asked for."""

    def loss(**given: Any) -> Tensor:
        moved: dict[str, Any] = {
            name: x.to(place.device)
            if isinstance(x, Tensor) and (name != "temperature" or tau_on_device)
            else x
            for name, x in given.items()
        }
        return supcon_loss(**moved, backend=place.backend).cpu()

    return loss
