"""A kernel to compile, the row that says what it compiled to, and the faults that such a row shows."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from codegen.chips import MACS, SHARED_KIB, TENSOR_MEMORY_COLUMNS
from reporting.rows import RESULTS, read_rows
from supcon_kernels.triton_launch import Launch
from supcon_kernels.triton_shipped import shipped_launches

OURS_CSV, PEERS_CSV = RESULTS / "gpu_codegen.csv", RESULTS / "gpu_codegen_peers.csv"
EARLIER_CSV = RESULTS / "gpu_codegen_triton36.csv"  # by the Triton that the card ran
DTYPES = ("bfloat16", "float16", "float32", "tf32")
DIMS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
TILE_PAIRS = 128 * 128
GOALS = {
    ("forward out/all", 80): 12.0,
    ("backward out/all", 80): 10.5,
    ("forward out/all", 90): 8.0,
    ("backward out/all", 90): 10.0,
}
"""Most instructions that a pair may take in bfloat16 at D=128, in tiles of which a multiprocessor
holds two programs. Kernels of ten lines that compare labels reach 7.7 forward, in 128×64, and 9.4
backward, in 64×128, on sm_90: five and six of them for the pair itself, which are hidden where
one program's products run beside the other's exponentials."""
MOST_SPILLS = 0.6
"""Reads and writes of spilled registers that a pair may take in the main loop. Tiles that take 0.2 in bfloat16
and 0.5 in float32 were the fastest on an H200."""
TOLD_APART = ("package", "label", "dtype", "dim", "arch")


@dataclass(frozen=True)
class Source:
    """One launch to compile: the package and module that the kernel is from, and a label to find it by."""

    package: str
    module: str
    label: str
    dtype: str
    dim: int
    arch: int
    launch: Launch

    @property
    def key(self) -> tuple[object, ...]:
        return tuple(getattr(self, name) for name in TOLD_APART)


@dataclass(frozen=True)
class Compiled:
    """What came of it: a row of the CSV. The main loop is that of sass.py; None: no main loop."""

    package: str
    label: str
    kernel: str
    dtype: str
    dim: int
    arch: int
    num_warps: int
    num_stages: int
    fingerprint: str
    triton: str
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    tensor_memory_columns: int = 0
    tensor_cores: str = ""
    num_atomics: int = 0
    is_pair_kernel: int = 0
    macs_per_pair: float | None = None
    num_main_loops: int = 0
    pairs_per_trip: float | None = None
    instructions_per_pair: float | None = None
    peeled_instructions_per_pair: float | None = None
    ex2_per_pair: float | None = None
    rcp_per_pair: float | None = None
    compares_per_pair: float | None = None
    spills_per_pair: float | None = None
    global_loads_per_trip: float | None = None
    exponentials_in_flight: float | None = None
    programs_per_multiprocessor: int = 0
    failure: str = ""
    commit: str = ""
    dirty: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        return tuple(getattr(self, name) for name in TOLD_APART)

    @property
    def tile_clocks(self) -> float | None:
        """A model, not a measurement: clocks of a multiprocessor for 128×128 pairs in 16 bits.

        With two programs one's products run beside the other's exponentials; with one, only what the
        main loop issues between a product and its wait does, and the rest adds up.
        """
        if self.macs_per_pair is None or self.ex2_per_pair is None or "float" not in self.dtype:
            return None
        products = TILE_PAIRS * self.macs_per_pair / MACS[self.arch]
        issued = TILE_PAIRS * (self.instructions_per_pair or 0.0) / 128
        others = max(TILE_PAIRS * self.ex2_per_pair / 16, issued)
        beside = 1.0 if self.programs_per_multiprocessor > 1 else self.exponentials_in_flight or 0.0
        return max(products, beside * others) + (1 - beside) * others

    @property
    def spills_little(self) -> bool:
        """Whether the main loop hardly reads or writes what was spilled."""
        return self.spills_per_pair is not None and self.spills_per_pair <= MOST_SPILLS

    @property
    def faults(self) -> list[str]:
        """Why the kernel must not ship."""
        if self.failure:
            return [f"cannot be compiled or read: {self.failure}"]
        found = []
        if self.spilled_bytes and not self.spills_little:
            found.append(f"spills {self.spilled_bytes} bytes")
        if self.shared_bytes > SHARED_KIB[self.arch] * 1024:
            found.append(f"needs {self.shared_bytes / 1024:.1f} of {SHARED_KIB[self.arch]} KiB")
        if self.tensor_memory_columns > TENSOR_MEMORY_COLUMNS:
            found.append(f"needs {self.tensor_memory_columns} columns of tensor memory")
        if self.is_pair_kernel and self.dtype != "float32" and not self.tensor_cores:
            found.append("uses no tensor cores")
        if self.num_atomics:
            found.append(f"holds {self.num_atomics} atomics")
        if self.is_pair_kernel and not self.num_main_loops:
            found.append("has no loop of products and exponentials")
        goal = GOALS.get((self.label, self.arch))
        if goal and (self.dtype, self.dim) == ("bfloat16", 128):
            cost = (self.instructions_per_pair or 0.0, self.ex2_per_pair, self.rcp_per_pair)
            if cost[0] > goal or cost[1:] != (1.0, 0.0):
                found.append(f"takes {cost} instructions, ex2 and rcp a pair, not ({goal}, 1, 0)")
        return found


def shipped(dtypes: Iterable[str], dims: Iterable[int], archs: Iterable[int]) -> list[Source]:
    """Everything that the backend may launch."""
    return [
        Source("supcon_kernels", "supcon_kernels.kernels", label, dtype, dim, arch, launch)
        for dtype in dtypes
        for dim in dims
        for arch in archs
        for label, launch in shipped_launches(dtype, dim, arch)
    ]


def distinct(sources: Sequence[Source]) -> list[Source]:
    """The first source of each kernel: dtype and width are no part of some."""
    first: dict[Hashable, Source] = {}
    for source in sources:
        first.setdefault((source.launch.code, source.arch), source)
    return list(first.values())


def read_compiled() -> list[Compiled]:
    """What gpu_codegen.py has found, of ours and of the peers'."""
    return [
        row for path in (OURS_CSV, PEERS_CSV) if path.exists() for row in read_rows(path, Compiled)
    ]
