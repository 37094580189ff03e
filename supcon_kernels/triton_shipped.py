"""Everything that the backend may launch, for those who compile or test it without a device."""

from __future__ import annotations

import dataclasses
import itertools

from supcon_kernels.triton_launch import Launch, Plan
from supcon_kernels.triton_tiles import Target

FEW, MANY = 1024, 8192


def shipped_launches(dtype: str, dim: int, capability: int) -> list[tuple[str, Launch]]:
    """Every launch that the backend may choose for features of this dtype, width and architecture.

    Args:
        dtype: "float32", "float16" or "bfloat16"; "tf32" is float32 in one product of TF32.
        dim: D.
        capability: 80, 86, 90 or 100.

    Returns:
        (label, launch) pairs, the default loss first, one for each that compiles to a kernel of
        its own. Sizes stand in grids alone, so that two numbers of rows stand for all: few rows have
        tiles and blocks of their own.
    """
    launches: dict[object, tuple[str, Launch]] = {}
    options = itertools.product(
        ("out", "in"),
        ("all", "one_positive", "only_negatives"),
        ((True, True), (True, False), (False, False)),
        (None, 16384),
    )
    for few, (summation, denominator, (normalize, fits), num_cols) in itertools.product(
        (False, True), list(options)
    ):
        plan = Plan(
            dtype="float32" if dtype == "tf32" else dtype,
            dim=dim,
            num_rows=FEW if few else MANY,
            num_cols=num_cols,
            target=Target(capability, 100),
            fits=fits,
            summation=summation,
            denominator=denominator,
            normalize=normalize,
            tf32=dtype == "tf32",
        )
        for label, launch in _launches_of(plan):
            launches.setdefault(launch.code, (label + ", few rows" * few, launch))
    return list(launches.values())


def _launches_of(plan: Plan) -> list[tuple[str, Launch]]:
    """The launches of one plan under labels that tell them from those of another plan."""
    loss = f"{plan.summation}/{plan.denominator}"
    shape = "" if plan.square else ", memory"
    given = "" if plan.normalize else ", as given"
    n, found = plan.num_rows, []
    symmetric = dataclasses.replace(plan, symmetric=True)
    for running in plan.running:
        call = f"{loss}{', running maximum' if running else ''}{given}{shape}"
        found.append((f"forward {call}", plan.forward(running)))
        if plan.looks_twice:
            found.append((f"first forward {call}", plan.forward(running, first_look=True)))
        if plan.is_wide:
            n_cols = plan.num_cols or n
            found.append((f"backward {call}", plan.derivatives(running, n, n_cols)))
            if symmetric.both and not plan.square:
                found.append((f"forward of both {call}", symmetric.forward(running)))
                if plan.looks_twice:
                    first = symmetric.forward(running, first_look=True)
                    found.append((f"first forward of both {call}", first))
            if not plan.square:
                both = plan.derivatives(running, n, n_cols, both_anchor=True)
                found.append((f"backward of both {call}", both))
            continue
        found.append((f"backward {call}", plan.backward(running)))
        if not plan.square:
            found += [
                (f"backward of both {call}", plan.backward(running, both_anchor=True)),
                (f"backward of columns {call}", plan.backward(running, of_columns=True)),
            ]
    for reduction in ("mean", "positive_mean", "sum", "none"):
        found.append((f"loss {loss}, {reduction}", plan.loss(reduction, n)))
    in_dtypes = {"": False} if plan.dtype == "float32" else {"": False, ", unrounded": True}
    gradients = [
        (f"gradient{given}{label}", plan.gradient(n, dots=dots, unrounded=unrounded))
        for of_dtype, unrounded in in_dtypes.items()
        for dots, label in ((False, of_dtype), (True, f", dots{of_dtype}"))
    ]
    return [
        *found,
        (f"prepare{given}", plan.prepare(n)),
        (f"weights {loss}{given}", plan.weights(n)),
        *gradients,
        (f"temperature{given}", plan.temperature_gradient()),
    ]
