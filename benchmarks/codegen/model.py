"""A model of the time that a loss takes on a card: the work of its kernels over the card's rates.

Within a program of a kernel times add up. The programs that a multiprocessor holds at once overlap,
down to the slowest unit. Not a measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from codegen.chips import programs_of
from codegen.kernels import Compiled
from measuring.workloads import Workload
from supcon_kernels.triton_tiles import is_wide

PHASES = ("forward", "backward")


@dataclass(frozen=True)
class Card:
    """Rates without sparsity, published unless measured ones replace them, and the clock of these."""

    name: str
    arch: int
    num_sms: int
    clock_ghz: float
    matrix_tflops: dict[str, float]
    bandwidth_gbs: float
    ex2_per_sm_clock: float = 16
    instructions_per_sm_clock: int = 128  # four schedulers, one instruction of 32 threads each

    @property
    def sm_ghz(self) -> float:
        return self.num_sms * self.clock_ghz


CARDS = (
    # NVIDIA A100 Tensor Core GPU datasheet (SXM, 80 GB) and architecture whitepaper.
    Card("A100", 80, 108, 1.41, {"16-bit": 312, "tf32": 156, "float32": 19.5}, 2039),
    # NVIDIA H100 datasheet (SXM) and architecture whitepaper.
    Card("H100", 90, 132, 1.83, {"16-bit": 989.4, "tf32": 494.7, "float32": 67}, 3350),
    # NVIDIA H200 datasheet (SXM): the H100's chip with other memory.
    Card("H200", 90, 132, 1.83, {"16-bit": 989.4, "tf32": 494.7, "float32": 67}, 4800),
    # NVIDIA HGX B200 datasheet, per GPU.
    Card("B200", 100, 148, 1.86, {"16-bit": 2250, "tf32": 1125, "float32": 75}, 8000),
)

LAUNCH_US = 2.5
"""Assumed for one launch: what NVIDIA reports for launching a straight-line CUDA graph."""
L2_BYTES_PER_CLOCK = 5120
"""Of a card: the A100's, by its architecture whitepaper; assumed of its successors, too."""
CHUNK_BYTES = 2**25
"""Of a chunk of scores, which L2 holds on every card."""


@dataclass(frozen=True)
class PairKernel:
    """A kernel over all pairs: it multiplies and exponentiates scores, and maybe goes on to a gradient."""

    phase: str
    label: str  # as in gpu_codegen.py's rows
    gradients: int = 0
    launches: int = 1


@dataclass(frozen=True)
class Scheme:
    """The kernels over pairs that a step launches, read from their source."""

    name: str
    package: str
    kernels: tuple[PairKernel, ...]
    takes_16_bit: bool = True
    float32_passes: int = 1
    # Whether the derivatives of these rows' pairs are written, and multiplied by cuBLAS.
    in_blocks: Callable[[int, str, int], bool] = lambda dim, dtype, arch: False

    def in_phase(self, phase: str) -> list[PairKernel]:
        return [kernel for kernel in self.kernels if kernel.phase == phase]

    def exponentials(self, phase: str) -> int:
        """Of a pair; there is one for each score."""
        return self.launches(phase)

    def products(self, phase: str) -> int:
        """N×N×D products: one for the scores, each time that they are computed, one for a gradient."""
        return sum(k.launches * (1 + k.gradients) for k in self.in_phase(phase))

    def launches(self, phase: str) -> int:
        return sum(kernel.launches for kernel in self.in_phase(phase))


SCHEMES = (
    Scheme(
        "supcon_kernels",
        "supcon_kernels",
        # Rows are columns: one merged matrix, so one product for the gradient where others have two.
        (
            PairKernel("forward", "forward out/all"),
            PairKernel("backward", "backward out/all", gradients=1),
        ),
        float32_passes=3,  # tf32 three times over, to float32's precision
        in_blocks=is_wide,
    ),
    Scheme(
        "memeff",
        "memeff 0.3.1",
        (
            PairKernel("forward", "clip_denom_kernel"),
            # Once for each tower.
            PairKernel("backward", "clip_fa_grad_kernel", gradients=1, launches=2),
        ),
    ),
    Scheme(
        "Inf-CL",
        "Inf-CL 1.2.1",
        (
            PairKernel("forward", "_prob_fwd_kernel"),
            PairKernel("backward", "_dq_prob_bwd_kernel", gradients=1),
            PairKernel("backward", "_dk_prob_bwd_kernel", gradients=1),
        ),
        takes_16_bit=False,  # it widens its operands to float32
    ),
)


@dataclass(frozen=True)
class Bound:
    """The least time of one phase, limit by limit: a row of the CSV.

    ``serial_us``: the units one after another, shared by the ``programs`` of a multiprocessor.
    """

    scheme: str
    card: str
    num_rows: int
    dim: int
    dtype: str
    phase: str
    products: int
    exponentials: int
    launches: int
    programs: int
    matrix_us: float
    exponential_us: float
    instruction_us: float | None
    serial_us: float
    memory_us: float
    launch_us: float
    least_us: float
    limit: str
    kind: str = "model, not measured"


def bound(
    scheme: Scheme,
    card: Card,
    workload: Workload,
    phase: str,
    compiled: Sequence[Compiled] = (),
) -> Bound:
    """The model of a square call; instructions count where ``compiled`` holds all kernels of the phase."""
    num_rows, dim, dtype = workload.num_rows, workload.dim, workload.dtype
    launches = scheme.launches(phase)
    steps = [
        _kernel_us(scheme, card, kernel, workload, compiled) for kernel in scheme.in_phase(phase)
    ]
    total = {name: sum(step[name] for step in steps) for name in steps[0]}
    least_us = LAUNCH_US * launches + sum(
        max(us for name, us in step.items() if name != "programs") for step in steps
    )
    total["launch"] = LAUNCH_US * launches
    programs = int(min(step["programs"] for step in steps))
    del total["programs"]
    has_instructions = all(
        _row(scheme, card, k, workload, compiled) for k in scheme.in_phase(phase)
    )
    return Bound(
        scheme=scheme.name,
        card=card.name,
        num_rows=num_rows,
        dim=dim,
        dtype=dtype,
        phase=phase,
        products=scheme.products(phase),
        exponentials=scheme.exponentials(phase),
        launches=launches,
        programs=programs,
        matrix_us=total["matrix"],
        exponential_us=total["exponential"],
        instruction_us=total["instruction"] if has_instructions else None,
        serial_us=total["serial"],
        memory_us=total["memory"],
        launch_us=total["launch"],
        least_us=least_us,
        limit=max(total, key=total.__getitem__),
    )


def chunked_bound(card: Card, workload: Workload, phase: str) -> Bound:
    """The dense formula in chunks of rows, by cuBLAS in float32 and one fused pass.

    The forward writes scores and reads them once; the backward also writes the two parts of H that
    are multiplied, and reads them once. Kernels follow each other, so that all times add up.
    """
    num_rows, dim = workload.num_rows, workload.dim
    products, passes_bytes, launches = {"forward": (1, 8, 2), "backward": (2, 24, 4)}[phase]
    launches *= -(-4 * num_rows**2 // CHUNK_BYTES)
    matrix_us = 1e-6 * 2 * products * num_rows**2 * dim / card.matrix_tflops["float32"]
    memory_us = 1e-3 * passes_bytes * num_rows**2 / (L2_BYTES_PER_CLOCK * card.clock_ghz)
    exponential_us = 1e-3 * num_rows**2 / (card.ex2_per_sm_clock * card.sm_ghz)
    times = {
        "matrix_us": matrix_us,
        "exponential_us": exponential_us,
        "memory_us": memory_us,
        "launch_us": LAUNCH_US * launches,
    }
    return Bound(
        scheme="chunked dense",
        card=card.name,
        num_rows=num_rows,
        dim=dim,
        dtype="float32",
        phase=phase,
        products=products,
        exponentials=1,
        launches=launches,
        programs=1,
        instruction_us=None,
        serial_us=matrix_us + max(memory_us, exponential_us),
        least_us=matrix_us + max(memory_us, exponential_us) + LAUNCH_US * launches,
        limit=max(times, key=times.__getitem__).removesuffix("_us"),
        matrix_us=matrix_us,
        exponential_us=exponential_us,
        memory_us=memory_us,
        launch_us=times["launch_us"],
    )


def _kernel_us(
    scheme: Scheme, card: Card, kernel: PairKernel, workload: Workload, compiled: Sequence[Compiled]
) -> dict[str, float]:
    """What each unit takes for all launches of one kernel, one after another, and memory."""
    num_rows, dim, dtype = workload.num_rows, workload.dim, workload.dtype
    is_16_bit = dtype != "float32" and scheme.takes_16_bit
    pairs = num_rows**2 * kernel.launches
    in_blocks = kernel.gradients > 0 and scheme.in_blocks(dim, dtype, card.arch)
    passes = scheme.float32_passes if dtype == "float32" else 1
    rate_of = {"scores": card.matrix_tflops["16-bit" if is_16_bit else "tf32"] / passes}
    rate_of["gradient"] = rate_of["scores"]
    if in_blocks and dtype == "float32":
        rate_of["gradient"] = card.matrix_tflops["float32"]
    product = 1e-6 * 2 * pairs * dim
    size = 2 if is_16_bit else 4
    # The features once, and a gradient as large, for each launch: columns come again from a cache.
    matrices = kernel.launches * (2 if kernel.phase == "backward" else 1)
    row = _row(scheme, card, kernel, workload, compiled)
    instructions = row.instructions_per_pair if row and row.instructions_per_pair else 0.0
    rate = card.instructions_per_sm_clock * card.sm_ghz
    units = {
        "matrix": product / rate_of["scores"] + kernel.gradients * product / rate_of["gradient"],
        "exponential": 1e-3 * pairs / (card.ex2_per_sm_clock * card.sm_ghz),
        "instruction": 1e-3 * instructions * pairs / rate,
    }
    programs = 1
    if row:  # that of a failed compilation has no registers
        found = programs_of(row.arch, max(row.registers, 1), row.shared_bytes, row.num_warps)
        programs = max(1, found)
    return units | {
        "serial": sum(units.values()) / programs,
        # What is written of the pairs is read again.
        "memory": 1e-3
        * size
        * (matrices * num_rows * dim + in_blocks * 2 * pairs)
        / card.bandwidth_gbs,
        "programs": programs,
    }


def _row(
    scheme: Scheme, card: Card, kernel: PairKernel, workload: Workload, compiled: Sequence[Compiled]
) -> Compiled | None:
    """What the kernel compiled to for the card."""
    dtype = workload.dtype if scheme.takes_16_bit else "float32"
    wanted = (scheme.package, kernel.label, dtype, workload.dim, card.arch)
    return next((row for row in compiled if row.key == wanted), None)


def find_card(device_name: str) -> Card | None:
    """The card of that name, as torch gives it: 'NVIDIA H100 80GB HBM3'."""
    return next((card for card in CARDS if card.name in device_name.split()), None)


def with_rates(card: Card, rates: Mapping[str, float]) -> Card:
    """The card with the rates that gpu_check.py's facts have measured, by their names there."""
    tflops = card.matrix_tflops
    exponentials = rates.get("exponentials", 1e-3 * card.ex2_per_sm_clock * card.sm_ghz)
    return replace(
        card,
        matrix_tflops={
            "16-bit": rates.get("bfloat16 product", tflops["16-bit"]),
            "tf32": rates.get("tf32 product", tflops["tf32"]),
            "float32": rates.get("float32 product", tflops["float32"]),
        },
        bandwidth_gbs=rates.get("copy", card.bandwidth_gbs),
        ex2_per_sm_clock=1e3 * exponentials / card.sm_ghz,
    )
