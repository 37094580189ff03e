"""How fast a step is beside the others, and where its time goes: one part a shape.

What is wrong gets no speed. Times are medians of turns; ``both_ms`` is the device's time behind a
full queue, ``eager_ms`` what a step takes from Python, ``graph_ms`` its replay as a CUDA graph.
TFLOP/s count the products that a scheme without the N×M matrix needs: one forward, and backward two
where rows are columns, else three.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from gpu import backend
from gpu.facts import measured_rates
from gpu.place import Items, Place, Row, first_line
from gpu.processes import in_processes
from gpu.timing import Call, Laps, Mark, captured, eager_ms, time_interleaved, time_kernels
from measuring.admission import admit
from measuring.peak_memory import measure_own_peak_mib
from measuring.providers import GPU_PEERS, OURS, Provider, make_provider
from measuring.workloads import Problem, Workload, compute_truth, make_checked_problem, make_problem
from supcon_kernels import supcon_loss

LEARNED = ", learned τ"
IN_BLOCKS = f"{OURS}triton], H in blocks"
"""The way of wide rows where both can go: from which width on is it the faster one?"""
BRIEF = ("dense", "chunked")
CAPTURED = ("dense", "chunked", "matmuls")
"""Of the others, those that are replayed as a CUDA graph, too."""
TRITON = ("memeff", "inf-cl", "siglip-kernel")
SMALL = 1024
KEPT = ("status", "note", "loss_error", "grad_error", "bound")
SECONDS = 4.0


@dataclass(frozen=True)
class Shape:
    """What is measured at once, and beside whom."""

    workload: Workload
    others: tuple[str, ...] = BRIEF

    @property
    def name(self) -> str:
        w = self.workload
        memory = f"×{w.num_cols}" if w.num_cols else ""
        return f"N={w.num_rows}{memory} D={w.dim} {w.num_classes} classes {w.dtype}"


def shapes(place: Place) -> list[Shape]:
    """The most telling first: what comes late may not be reached."""
    if place.is_tiny:
        tiny = Workload(64, 16, num_classes=4, device=place.device)
        return [Shape(tiny, ("dense", "chunked", "memeff")), Shape(replace(tiny, num_cols=96))]
    bf16 = Workload(8192, dtype="bfloat16", device=place.device)
    peers = ("dense", "matmuls", *GPU_PEERS)
    compiled = ("dense", "dense-compiled", "matmuls", *GPU_PEERS)
    return [
        Shape(bf16, (*compiled, IN_BLOCKS)),
        Shape(replace(bf16, num_rows=32768), peers),
        Shape(replace(bf16, num_rows=1024), compiled),
        Shape(replace(bf16, num_rows=4096), peers),
        Shape(replace(bf16, num_rows=256), peers),
        Shape(replace(bf16, num_rows=16384, dim=768), peers),
        Shape(replace(bf16, num_rows=16384, dim=256), (*BRIEF, IN_BLOCKS)),
        Shape(replace(bf16, num_rows=16384, num_cols=16384, dim=768)),
        Shape(replace(bf16, num_rows=65536), ("memeff", "siglip-kernel")),
        Shape(replace(bf16, num_rows=65536, dim=768), ("siglip-kernel",)),
        Shape(replace(bf16, dtype="float32")),
        Shape(replace(bf16, num_classes=4096)),  # SimCLR: two views of each
        Shape(replace(bf16, num_classes=1000)),
        # A batch before a memory, of few large classes and of many small ones.
        Shape(replace(bf16, num_rows=256, num_cols=65536)),
        Shape(replace(bf16, num_rows=256, num_cols=65536, num_classes=16384)),
        *(Shape(replace(bf16, num_rows=16384, dim=dim)) for dim in (512, 1024, 64)),
        *(Shape(replace(bf16, num_rows=n)) for n in (20480, 12288)),
    ]


def items(place: Place) -> Items:
    found = shapes(place)
    measured: Items = {
        shape.name: functools.partial(_measure, place, shape, len(found) - k)
        for k, shape in enumerate(found)
    }
    return {"compile ahead": functools.partial(_compile_ahead, place, found), **measured}


def _compile_ahead(place: Place, found: list[Shape]) -> Iterator[Row]:
    ours = f"{OURS}{place.backend}]"
    calls: dict[tuple[object, ...], tuple[str, Workload]] = {}
    for shape in found:
        w = shape.workload
        code = (w.dtype, w.dim, w.num_cols > 0, w.num_rows <= SMALL)  # what kernels depend on
        ahead = (ours, ours + LEARNED, *(x for x in shape.others if x in (*TRITON, IN_BLOCKS)))
        for name in ahead:
            calls.setdefault((name, *code), (name, w))
        if "dense-compiled" in shape.others:
            calls["dense-compiled", w] = ("dense-compiled", w)
    for answer in in_processes(place, first_step, list(calls.values())):
        name, workload = answer.argument
        row: Row = {"compiled": f"{name} {Shape(workload).name}", "seconds": answer.seconds}
        # What fails fails again where it is measured; a peer may just not be installed.
        status = {} if answer.status == "failed" else {"status": answer.status}
        yield row | status | {"detail": answer.detail}


def first_step(place: Place, call: tuple[str, Workload]) -> None:
    """One step of a provider, for what it leaves in the compilers' caches."""
    name, workload = call
    make(name, workload, place).step(make_problem(workload))
    if place.device == "cuda":
        torch.cuda.synchronize()


def make(name: str, workload: Workload, place: Place) -> Provider:
    """The provider of that name; ours also with a temperature that is a parameter, or H in blocks."""
    if name == IN_BLOCKS:
        return _in_blocks(make_provider(f"{OURS}triton]", workload))
    if not name.endswith(LEARNED):
        return make_provider(name, workload)
    tau = torch.tensor(workload.temperature, device=workload.device, requires_grad=True)

    def forward(problem: Problem) -> torch.Tensor:
        return supcon_loss(
            problem.features,
            problem.labels,
            contrast_features=problem.contrast_features,
            contrast_labels=problem.contrast_labels,
            temperature=tau,
            backend=place.backend,
        )

    def backward(problem: Problem, loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss, (*problem.leaves, tau))[:-1]

    return Provider(name, forward, backward)


def _in_blocks(provider: Provider) -> Provider:
    def forward(problem: Problem) -> torch.Tensor:
        with backend.in_blocks():
            return provider.forward(problem)

    def backward(problem: Problem, loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with backend.in_blocks():
            return provider.backward(problem, loss)

    return Provider(IN_BLOCKS, forward, backward)


def _measure(place: Place, shape: Shape, num_left: int) -> Iterator[Row]:
    """Hold everyone against float64, let the right ones take turns, then look into ours."""
    workload, ours = shape.workload, f"{OURS}{place.backend}]"
    checked, problem = make_checked_problem(workload), make_problem(workload)
    truth = compute_truth(checked)
    admitted: dict[str, Provider] = {}
    verdicts: dict[str, Row] = {}
    for name in (*shape.others, ours, ours + LEARNED):
        verdict = {"provider": name, **asdict(workload)}
        try:
            admission = admit(name, workload, checked, truth, functools.partial(make, place=place))
            verdict |= {k: getattr(admission.verdict, k) for k in KEPT}
            if admission.provider:
                admission.provider.step(
                    problem
                )  # what is not compared with the truth may fail here
                admitted[name] = admission.provider
        except Exception as failure:  # a provider that fails is a row, the others go on
            verdict |= {"status": "failed", "note": first_line(failure)}
        verdicts[name] = verdict
        yield verdict  # before anything is timed, which may hang
    steps = {name: as_call(provider, problem) for name, provider in admitted.items()}
    share_s = max(0.0, place.seconds_left) / num_left
    budget_s = 0.0 if place.is_tiny else min(SECONDS, 0.4 * share_s)
    laps = time_interleaved(steps, place.device, budget_s)
    yield {"medians_ms": {name: lap.median for name, lap in laps.items()}}
    for name, step in steps.items():
        row = verdicts[name] | _times(laps[name], workload, place)
        row["eager_ms"] = eager_ms(step, place.device, 3 if laps[name].median > 5 else 20)
        row["peak_mib"] = _peak_mib(admitted[name], problem)
        if place.device == "cuda" and (name.startswith(OURS) or name in CAPTURED):
            row |= _graph_and_kernels(step, place)
        yield row


def as_call(provider: Provider, problem: Problem) -> Call:
    def call(mark: Mark) -> None:
        output = provider.forward(problem)
        mark()
        provider.backward(problem, output)

    return call


def _times(laps: Laps, workload: Workload, place: Place) -> Row:
    """Medians of the phases and of the whole, their rates, and their shares of the card's products."""
    low, high = laps.quartiles
    times = {"forward": laps.lap(0), "backward": laps.lap(1), "both": laps.median}
    backward = 3 if workload.num_cols else 2
    products = {"forward": 1, "backward": backward, "both": 1 + backward}
    rates = measured_rates(Path(place.folder)) if place.folder else {}
    peak = rates.get("bfloat16 product" if workload.torch_dtype.itemsize == 2 else "tf32 product")
    row: Row = {"q25_ms": low, "q75_ms": high, "num_samples": len(laps.calls)}
    row["is_ahead"] = laps.is_ahead
    for phase, time_ms in times.items():
        tflops = 2e-9 * products[phase] * workload.num_pairs * workload.dim / time_ms
        row |= {f"{phase}_ms": time_ms, f"{phase}_tflops": tflops}
        row[f"{phase}_share"] = tflops / peak if peak else None
    return row


def _peak_mib(provider: Provider, problem: Problem) -> float | None:
    """Memory above the inputs; on a CPU it takes a process of its own, which is not worth it here."""
    if problem.workload.device != "cuda":
        return None
    return measure_own_peak_mib(provider, problem).both


def _graph_and_kernels(step: Call, place: Place) -> Row:
    row: Row = {}
    try:
        kernels = time_kernels(step)
        row["launches"] = sum(float(str(kernel["launches"])) for kernel in kernels)
        row["kernels_us"] = sum(float(str(kernel["us"])) for kernel in kernels)
        row["kernels"] = kernels[:12]
        replay = captured(step)
        row["graph_ms"] = time_interleaved({"": replay}, place.device, 0.3)[""].median
    except Exception as failure:  # what cannot be captured is a row, too
        row["graph_failure"] = first_line(failure)
    return row
