"""All that needs a GPU, in one run of under eight minutes: right, deterministic, capturable, how fast.

python benchmarks/gpu_check.py prints a short table last and writes two CSVs that carry the card's
name. Without a GPU it says what it would do and exits 0. Exits 1 where a check failed.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench_loss import bench_size
from machine import REPOSITORY, describe_machine
from providers import GPU_PEERS, OURS
from results import Report, Result, render_table, write_csv, write_rows
from roofline import SCHEMES, bound, find_card, read_compiled
from supcon_kernels import supcon_loss
from workloads import Workload, make_problem

sys.path.insert(0, str(REPOSITORY / "tests"))

from cases import CASES, VARIANTS, by_id
from compare import assert_close

RESULTS = REPOSITORY / "benchmarks" / "results"
BACKEND = "triton"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MINUTES = 8.0
SMOKE = ("ragged", "ignored_garbage", "self_in_memory")
SANITIZERS = ("memcheck", "racecheck")
SANITIZER_SECONDS = 60
WORKLOADS = (
    Workload(4096, dtype="bfloat16", device="cuda"),
    Workload(8192, dtype="bfloat16", device="cuda"),
    Workload(32768, dtype="bfloat16", device="cuda"),
    Workload(8192, dtype="float32", device="cuda"),
    # A batch before a memory. With few contrasts a class its positives are told apart one by one,
    # in columns far apart; with many they come from sums over classes.
    Workload(256, num_cols=65536, num_classes=16384, dtype="bfloat16", device="cuda"),
    Workload(256, num_cols=65536, dtype="bfloat16", device="cuda"),
)
CONTENDERS = ("dense", "dense-compiled", "matmuls", *GPU_PEERS, f"{OURS}{BACKEND}]")
SCHEME_OF = {f"{OURS}{BACKEND}]": "supcon_kernels", "memeff": "memeff", "inf-cl": "Inf-CL"}


@dataclass(frozen=True)
class Finding:
    """What one check said: ok, failed, refused (not this backend's call) or not reached."""

    step: str
    what: str
    status: str
    detail: str = ""


@dataclass(frozen=True)
class Place:
    """Where the checks run; the tests run what they can on a CPU, with another backend."""

    device: str = "cuda"
    backend: str = BACKEND
    num_jobs: int = 8
    deadline_s: float = float("inf")

    @property
    def is_late(self) -> bool:
        return time.monotonic() > self.deadline_s


def finding(step: str, what: str, check: Callable[[], object]) -> Finding:
    """Run one check; what it raises is what it found."""
    try:
        check()
    except ValueError as refusal:
        is_refusal = "cannot take this call" in str(refusal)
        return Finding(step, what, "refused" if is_refusal else "failed", _first_line(refusal))
    except Exception as failure:
        return Finding(step, what, "failed", f"{type(failure).__name__}: {_first_line(failure)}")
    return Finding(step, what, "ok")


def _first_line(failure: BaseException) -> str:
    return (str(failure).splitlines() or [""])[0]


# --- the cases of the tests


@dataclass(frozen=True)
class Check:
    """One case of the tests' table in one dtype, one loss, with the temperature on host or device."""

    case: str
    dtype: torch.dtype
    variant: tuple[str, str]
    temperature_on_device: bool = False

    @property
    def name(self) -> str:
        place = ", τ on the device" if self.temperature_on_device else ""
        return f"{self.case}, {'/'.join(self.variant)}, {str(self.dtype)[6:]}{place}"


def all_checks() -> list[Check]:
    """Every case in every dtype and every loss, and once more where the host cannot read τ."""
    checks = [Check(c.id, dtype, v) for c in CASES for dtype in DTYPES for v in VARIANTS]
    return checks + [Check(c.id, torch.float32, v, True) for c in CASES for v in VARIANTS]


def run_check(check: Check, place: Place) -> Finding:
    """Hold loss and gradients against float64, as the tests do."""
    if place.is_late:
        return Finding("cases", check.name, "not reached")
    options = dict(zip(("summation", "denominator"), check.variant))
    arguments = {**by_id(check.case).arguments(), **options}

    def loss(**given: object) -> Tensor:
        moved = {
            name: x.to(place.device)
            if isinstance(x, Tensor) and (name != "temperature" or check.temperature_on_device)
            else x
            for name, x in given.items()
        }
        return supcon_loss(**moved, backend=place.backend).cpu()  # type: ignore[arg-type]

    compare = functools.partial(assert_close, loss, arguments, check.dtype)
    return finding("cases", check.name, compare)


def check_cases(place: Place, checks: Sequence[Check]) -> list[Finding]:
    """In several processes, as most of the time goes to compiling kernels."""
    run = functools.partial(run_check, place=place)
    if place.num_jobs == 1:
        return [run(check) for check in checks]
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(place.num_jobs, spawn, initializer=_start_worker) as pool:
            return list(pool.map(run, checks, chunksize=4))
    except BrokenProcessPool:
        return [Finding("cases", "all", "failed", "a process died: run again with --jobs 1")]


def _start_worker() -> None:
    torch.set_num_threads(1)


# --- how a step behaves


def one_step(place: Place, workload: Workload) -> Callable[[], tuple[Tensor, ...]]:
    """The loss and its gradient, on features that stay where they are."""
    problem = make_problem(workload)
    features, labels = problem.features, problem.labels

    def step() -> tuple[Tensor, ...]:
        loss = supcon_loss(features, labels, temperature=0.1, backend=place.backend)
        return loss.detach(), torch.autograd.grad(loss, features)[0]

    step.features = features  # type: ignore[attr-defined]
    return step


def _workload(place: Place, dtype: str, num_rows: int) -> Workload:
    return Workload(num_rows, dtype=dtype, device=place.device)


def check_determinism(place: Place, num_rows: int = 5000) -> list[Finding]:
    """The same bits three times over, with other work in between."""

    def check(dtype: str) -> None:
        step = one_step(place, _workload(place, dtype, num_rows))
        first = step()
        for _ in range(2):
            torch.randn(1024, 1024, device=place.device).mm(torch.eye(1024, device=place.device))
            _assert_same_bits(step(), first)

    return _for_each_dtype("determinism", check)


def _assert_same_bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other), f"differs by {(one - other).abs().max().item():.3g}"


def check_compile(place: Place, num_rows: int = 3000) -> list[Finding]:
    """torch.compile of the whole step, without a break in the graph."""

    def check(dtype: str) -> None:
        torch.compiler.reset()
        problem = make_problem(_workload(place, dtype, num_rows))
        loss_of = functools.partial(supcon_loss, temperature=0.1, backend=place.backend)
        eager = loss_of(problem.features, problem.labels)
        compiled = torch.compile(loss_of, fullgraph=True)(problem.features, problem.labels)
        torch.testing.assert_close(compiled, eager)
        grads = [torch.autograd.grad(loss, problem.features)[0] for loss in (compiled, eager)]
        torch.testing.assert_close(*grads)

    return _for_each_dtype("torch.compile", check)


def check_no_sync(place: Place) -> list[Finding]:
    """No call that waits for the device."""

    def check(dtype: str) -> None:
        step = one_step(place, _workload(place, dtype, 3000))
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return _for_each_dtype("no host synchronisation", check)


def check_cuda_graph(place: Place) -> list[Finding]:
    """A captured step, replayed on other features, gives the bits of an eager one."""

    def check(dtype: str) -> None:
        step = one_step(place, _workload(place, dtype, 3000))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            step.features.copy_(step.features.flip(0))  # type: ignore[attr-defined]
        graph.replay()
        torch.cuda.synchronize()
        _assert_same_bits(captured, step())

    return _for_each_dtype("CUDA graph", check)


def _for_each_dtype(step: str, check: Callable[[str], None]) -> list[Finding]:
    names = [str(dtype)[6:] for dtype in DTYPES]
    return [finding(step, name, functools.partial(check, name)) for name in names]


def check_sanitizers(place: Place) -> list[Finding]:
    """A few cases under each tool of compute-sanitizer, where it is installed."""
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "/usr/local/cuda/bin/compute-sanitizer"
    )
    if tool is None:
        return [Finding("compute-sanitizer", "all tools", "refused", "it is not installed")]

    # Without torch's cache of blocks a step beyond a tensor is a step beyond its allocation.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    script = [sys.executable, __file__, "--smoke"]
    found = []
    for name in SANITIZERS:
        command = [tool, "--tool", name, "--error-exitcode", "1", *script]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=environment, timeout=SANITIZER_SECONDS
            )
        except subprocess.TimeoutExpired:
            found.append(Finding("compute-sanitizer", name, "not reached", "it took too long"))
            continue
        last_line = (done.stdout + done.stderr).strip().splitlines()[-1]
        status = "ok" if done.returncode == 0 else "failed"
        found.append(Finding("compute-sanitizer", name, status, last_line))
    return found


def smoke() -> int:
    """What the sanitizers watch: a few cases in this process alone."""
    checks = [Check(name, dtype, ("out", "all")) for name in SMOKE for dtype in DTYPES]
    checks += [Check(SMOKE[-1], DTYPES[0], variant) for variant in VARIANTS[1:]]
    found = check_cases(Place(num_jobs=1), checks)
    return int(any(each.status == "failed" for each in found))


# --- how fast


def measure(
    place: Place, workloads: Sequence[Workload], budget_s: float, names: Sequence[str] = CONTENDERS
) -> Iterator[Result]:
    """Time and peak memory beside the others; a provider that is wrong gets no speed."""
    for workload in workloads:
        if place.is_late:
            _say(f"N={shape_of(workload)}, {workload.dtype}: not reached")
            continue
        yield from bench_size(workload, names, budget_s, with_memory=True)


def shape_of(call: Workload) -> str:
    """How many anchors, and how many contrasts of how many classes where they are others."""
    memory = f"×{call.num_cols}, {call.num_classes} classes" if call.num_cols else ""
    return f"{call.num_rows}{memory}"


def time_table(results: Sequence[Result], device_name: str) -> str:
    """Per workload and provider, beside the least that the model of the card allows its scheme."""
    card, compiled = find_card(device_name), read_compiled()
    schemes = {scheme.name: scheme for scheme in SCHEMES}
    cells = [
        ["provider", "N", "dtype", "forward ms", "backward ms", "both ms", "peak MiB", "error"]
    ]
    cells[0] += ["model: least ms", "× least"]
    for both in (r for r in results if r.phase == "both"):
        same = [r for r in results if (r.num_rows, r.dtype, r.provider) == _identity(both)]
        halves = [
            next((r.time_ms for r in same if r.phase == p), None) for p in ("forward", "backward")
        ]
        least_ms = None
        if card and both.provider in SCHEME_OF and not both.num_cols:
            scheme = schemes[SCHEME_OF[both.provider]]
            call = (scheme, card, both.num_rows, both.dim, both.dtype)
            least_ms = 1e-3 * sum(
                bound(*call, p, compiled).least_us for p in ("forward", "backward")
            )
        ratio = both.time_ms / least_ms if both.time_ms and least_ms else None
        time_ms = both.verdict if both.time_ms is None else f"{both.time_ms:.3g}"
        error = f"{max(both.errors):.1e}" if both.errors else "not compared"
        cells.append(
            [
                *(both.provider, shape_of(both), both.dtype, *map(_three, halves), time_ms),
                *(_three(both.peak_mib), error, _three(least_ms), _three(ratio)),
            ]
        )
    return render_table(cells, markdown=False)


def _identity(result: Result) -> tuple[str, str, str]:
    return shape_of(result), result.dtype, result.provider


def _three(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


# --- the command

STEPS: dict[str, Callable[[Place], list[Finding]]] = {
    "every case, dtype and loss of the tests against float64": lambda place: check_cases(
        place, all_checks()
    ),
    "determinism: the same bits three times": check_determinism,
    "no host synchronisation": check_no_sync,
    "CUDA graph: capture, replay on other features": check_cuda_graph,
    "torch.compile of the step in one graph": check_compile,
    "compute-sanitizer, where installed": check_sanitizers,
}


def main(argv: Sequence[str] | None = None) -> int:
    args = _make_parser().parse_args(argv)
    if args.smoke:
        return smoke()
    if not torch.cuda.is_available():
        print("There is no CUDA device: nothing was checked or measured. With one, this would run")
        for title in STEPS:
            print(f"  - {title}")
        print(f"      ({len(all_checks())} comparisons)")
        for w in WORKLOADS:
            print(f"  - time and peak memory at N={shape_of(w)}, D={w.dim}, {w.dtype}: ", end="")
            print(", ".join(CONTENDERS))
        print(f"and write {RESULTS.relative_to(REPOSITORY)}/gpu_check_<card>.csv.")
        return 0
    return run(args)


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="do not start more after that"
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="of timing for each workload")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="only what the sanitizers watch")
    return parser


def run(args: argparse.Namespace) -> int:
    """Checks first: what is wrong gets no speed."""
    start_s = time.monotonic()
    # The cases may take half of the time, so that something is left for the rest.
    share = {title: 0.5 if title.startswith("every case") else 0.75 for title in STEPS}
    findings: list[Finding] = []
    for title, check in STEPS.items():
        deadline_s = start_s + 60 * args.minutes * share[title]
        place = Place(num_jobs=args.jobs, deadline_s=deadline_s)
        _say(title)
        findings += [Finding(title, "all", "not reached")] if place.is_late else check(place)
    place = Place(deadline_s=start_s + 60 * (args.minutes - 1))
    machine = describe_machine("cuda")
    report = Report(list(measure(place, WORKLOADS, args.seconds)), machine)
    stem = f"gpu_check_{card_stem(machine['gpu'])}"
    write_rows(args.output_dir / f"{stem}_checks.csv", findings)
    if report.results:
        write_csv(report, args.output_dir / f"{stem}.csv")
    print(summary(findings))
    print(
        f"\n{machine['gpu']}, torch {machine['torch']}, {time.monotonic() - start_s:.0f} s in all\n"
    )
    print(time_table(report.results, machine["gpu"]))
    failed = any(f.status == "failed" for f in findings)
    return int(failed or any(r.status in ("wrong", "failed") for r in report.results))


def card_stem(device_name: str) -> str:
    """'NVIDIA H100 80GB HBM3' as part of a file's name."""
    return re.sub(r"\W+", "_", device_name.removeprefix("NVIDIA ")).lower()


def summary(findings: Sequence[Finding]) -> str:
    """How many of each status in each step; and every failure by name."""
    statuses = ("ok", "failed", "refused", "not reached")
    cells = [["step", *statuses]]
    for step in dict.fromkeys(f.step for f in findings):
        of_step = [f.status for f in findings if f.step == step]
        cells.append([step, *(str(of_step.count(status)) for status in statuses)])
    failures = [f"FAILED {f.step}: {f.what}: {f.detail}" for f in findings if f.status == "failed"]
    return "\n".join([render_table(cells, markdown=False), *failures])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
