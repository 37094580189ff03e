"""Calls of the case table that ranks share out: which rank has which samples and contrasts."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from cases import CASES, VARIANTS, Arguments, by_id, takes
from compare import LEAVES
from supcon_kernels import supcon_loss

REDUCTIONS = ("mean", "positive_mean", "sum")
# No two ranks have equally many rows, and one has none.
FRACTIONS = {1: (1.0,), 2: (0.35, 1.0), 3: (0.4, 0.4, 1.0), 4: (0.2, 0.7, 0.7, 1.0)}


def plan() -> list[tuple[Any, ...]]:
    """(world, case, variant, reduction, backend, dtype): every case on three ranks, some on others."""
    calls = []
    reductions = itertools.cycle(REDUCTIONS)
    for k, case in enumerate(CASES):
        if "mask" in case.arguments():
            continue
        for j, variant in enumerate([("out", "all"), VARIANTS[1 + k % 5]]):
            for backend in ("tiled", "native"):
                dtype = (torch.float64, torch.float32)[(j + (backend == "native")) % 2]
                calls.append((3, case.id, variant, next(reductions), backend, dtype))
    for world, name, dtype in (
        (1, "two_views", torch.float64),
        (2, "self_in_memory", torch.float64),
        (2, "ragged", torch.float32),
        (4, "ragged", torch.float64),
        (4, "first_view_anchors", torch.float64),
        (4, "towers", torch.float64),
        (4, "symmetric_memory", torch.float64),
        (2, "symmetric_towers", torch.bfloat16),
        (4, "ignored_garbage", torch.float32),
        (4, "half_empty_memory", torch.float32),
        (4, "unlabelled_views", torch.bfloat16),
        (4, "memory", torch.float16),
    ):
        for variant, backend in itertools.product(VARIANTS, ("tiled", "native")):
            calls.append((world, name, variant, next(reductions), backend, dtype))
    return [call for call in calls if takes(call[-2], arguments_of(call))]


def interpreted_plan() -> list[tuple[Any, ...]]:
    """The same for the Triton kernels, under their interpreter."""
    two = [(2, name, ("out", "all")) for name in ("two_views", "self_in_memory", "three_features")]
    two += [(2, "singleton", variant) for variant in VARIANTS]
    others = ("symmetric_memory", "multi_hot", "soft_self_in_memory", "symmetric_soft")
    two += [(2, name, ("out", "all")) for name in (*others, "symmetric_wide")]
    two += [(2, "symmetric_memory", ("in", "one_positive"))]
    return [
        (*call, reduction, "triton", (torch.float32, torch.bfloat16)[k % 2])
        for k, (call, reduction) in enumerate(zip(two, itertools.cycle(REDUCTIONS)))
    ]


def arguments_of(call: tuple[Any, ...]) -> Arguments:
    _, name, (summation, denominator), reduction, _, _ = call
    options = {"summation": summation, "denominator": denominator, "reduction": reduction}
    return {**by_id(name).arguments(), **options}


def shares(arguments: Arguments, world: int) -> list[tuple[Tensor, Tensor, int | None]]:
    """Of every rank its samples and its contrasts, as indices, and its ``self_offset``."""
    samples = _parts(torch.arange(arguments["features"].shape[0]), world)
    if (contrasts := arguments.get("contrast_features")) is None:
        return [(own, own, None) for own in samples]
    first = arguments.get("self_offset")
    paired = first is not None or arguments.get("labels") is None
    own_cols = [own + (first or 0) if paired else own[:0] for own in samples]
    taken = torch.zeros(len(contrasts), dtype=torch.bool)
    taken[torch.cat(own_cols)] = True
    free = _parts((~taken).nonzero()[:, 0].flip(0), world)
    if first is None:
        return [
            (own, torch.cat((cols, rest)), None) for own, cols, rest in zip(samples, own_cols, free)
        ]
    halves = [len(rest) // 2 for rest in free]
    return [
        (own, torch.cat((rest[:half], cols, rest[half:])), half)
        for own, cols, rest, half in zip(samples, own_cols, free, halves)
    ]


def _parts(indices: Tensor, world: int) -> list[Tensor]:
    ends = [0, *(round(len(indices) * fraction) for fraction in FRACTIONS[world])]
    return [indices[begin:end] for begin, end in itertools.pairwise(ends)]


def own_part(arguments: Arguments, world: int, rank: int, dtype: torch.dtype) -> Arguments:
    """What the rank passes: leaves require grad."""
    samples, contrasts, offset = shares(arguments, world)[rank]
    part = {**arguments, "features": arguments["features"][samples]}
    if arguments.get("labels") is not None:
        part["labels"] = arguments["labels"][samples]
    for name in ("contrast_features", "contrast_labels"):
        if arguments.get(name) is not None:
            part[name] = arguments[name][contrasts]
    if offset is not None:
        part["self_offset"] = offset
    for name in ("features", "contrast_features"):
        if name in part:
            part[name] = part[name].to(dtype).requires_grad_()
    if arguments.get("base_temperature") is None:
        tau = torch.tensor(arguments["temperature"], dtype=torch.float64)
        part["temperature"] = tau.requires_grad_()
    return part


def table(calls: list[tuple[Any, ...]], rank: int, groups: dict[int, Any]) -> list[Any]:
    """The rank's loss and gradients of every call; None where it takes no part."""
    results: list[Any] = []
    for call in calls:
        world, *_, backend, dtype = call
        if rank >= world:
            results.append(None)
            continue
        part = own_part(arguments_of(call), world, rank, dtype)
        loss = supcon_loss(**part, backend=backend, group=groups[world])
        loss.backward()
        leaves = {name: part[name] for name in LEAVES if isinstance(part.get(name), Tensor)}
        assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves.values())
        results.append((loss.detach(), {name: leaf.grad for name, leaf in leaves.items()}))
    return results
