"""How a step behaves: captured and replayed, the same bits again, no wait for the device, one graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.place import Items, Place, Row
from measuring.workloads import Problem, Workload, make_problem
from supcon_kernels import supcon_loss

DTYPES = ("bfloat16", "float32", "float16")
NUM_ROWS = 3000
WIDE = ", both directions of wide rows"
WIDE_DIM = 512


def items(place: Place) -> Items:
    of_both = {
        "the same bits three times": check_determinism,
        "no host synchronisation": check_no_sync,
        "capture and replay on other features": check_cuda_graph,
        "torch.compile in one graph": check_compile,
    }
    checks = {name + kind: check for name, check in of_both.items() for kind in ("", WIDE)}
    checks["no host synchronisation, soft labels and a mask"] = check_no_sync_of_weights
    dtypes = DTYPES[1:2] if place.is_tiny else DTYPES
    return {
        f"{name}, {dtype}": functools.partial(_run, check, place, dtype, name.endswith(WIDE))
        for name, check in checks.items()
        for dtype in dtypes
    }


def _run(
    check: Callable[[Place, Problem], None], place: Place, dtype: str, is_wide: bool
) -> Iterator[Row]:
    num_rows = 60 if place.is_tiny else NUM_ROWS
    workload = Workload(num_rows, dtype=dtype, device=place.device)
    if is_wide:
        workload = replace(workload, dim=WIDE_DIM, num_cols=num_rows)
    check(place, make_problem(workload))
    yield from ()


def _loss(problem: Problem, **options: Any) -> Tensor:
    """Of the rows with each other, or with others in both directions."""
    if problem.contrast_features is not None:
        options |= {"contrast_features": problem.contrast_features, "symmetric": True}
        options |= {"contrast_labels": problem.contrast_labels}
    return supcon_loss(problem.features, problem.labels, **{"temperature": 0.1, **options})


def _step(place: Place, problem: Problem) -> tuple[Tensor, ...]:
    loss = _loss(problem, backend=place.backend)
    return loss.detach(), *torch.autograd.grad(loss, problem.leaves)


def check_determinism(place: Place, problem: Problem) -> None:
    """With other work in between."""
    first = _step(place, problem)
    for _ in range(2):
        torch.randn(1024, 1024, device=place.device).mm(torch.eye(1024, device=place.device))
        _assert_same_bits(_step(place, problem), first)


def _assert_same_bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other), f"differs by {(one - other).abs().max().item():.3g}"


def check_no_sync(place: Place, problem: Problem) -> None:
    """With the temperature as a number and as a parameter on the device."""
    place.needs_cuda()
    tau = torch.tensor(0.1, device=place.device, requires_grad=True)

    def learned() -> None:
        _loss(problem, temperature=tau, backend=place.backend).backward()

    for step in (functools.partial(_step, place, problem), learned):
        _assert_no_sync(step)


def check_no_sync_of_weights(place: Place, problem: Problem) -> None:
    """A mask is taken by the tiled backend alone."""
    place.needs_cuda()
    num_classes = problem.workload.num_classes
    soft_labels = 0.9 * F.one_hot(problem.labels, num_classes).float() + 0.1 / num_classes
    mask = soft_labels @ soft_labels.T

    def step(**given: Any) -> None:
        supcon_loss(problem.features, temperature=0.1, **given).backward()

    _assert_no_sync(functools.partial(step, labels=soft_labels, backend=place.backend))
    _assert_no_sync(functools.partial(step, mask=mask, backend="tiled"))


def _assert_no_sync(step: Callable[[], object]) -> None:
    """The second time: the first may compile."""
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_cuda_graph(place: Place, problem: Problem) -> None:
    """A captured step, replayed on other features, gives the bits of an eager one."""
    place.needs_cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            _step(place, problem)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(place, problem)
    with torch.no_grad():
        problem.features.copy_(problem.features.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    _assert_same_bits(captured, _step(place, problem))


def check_compile(place: Place, problem: Problem) -> None:
    """The loss without a break in the graph, and the gradient through it."""
    torch.compiler.reset()
    loss_of = functools.partial(_loss, problem, backend=place.backend)
    compiler = "aot_eager" if place.is_tiny else "inductor"
    eager, compiled = loss_of(), torch.compile(loss_of, fullgraph=True, backend=compiler)()
    torch.testing.assert_close(compiled, eager)
    grads = [torch.autograd.grad(loss, problem.leaves) for loss in (compiled, eager)]
    torch.testing.assert_close(*grads)
