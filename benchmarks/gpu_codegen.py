"""What the Triton kernels compile to, without a GPU: registers, spills, shared memory, instructions.

Every launch that the backend may choose is compiled ahead of time for each architecture, and its
disassembly is read (sass.py says what a main loop is). Exits 1 where a kernel spills registers,
needs more shared memory than the architecture has, multiplies 16-bit numbers without tensor
cores, or holds an atomic on global memory: python benchmarks/gpu_codegen.py --help
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import hashlib
import importlib
import io
import re
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import sass
from machine import REPOSITORY, describe_machine
from results import read_rows, render_table, update_document, write_rows
from supcon_kernels.triton_launch import Launch
from supcon_kernels.triton_run import source_of
from supcon_kernels.triton_shipped import shipped_launches

RESULTS = REPOSITORY / "benchmarks" / "results"
DOCS = REPOSITORY / "docs"
DTYPES = ("bfloat16", "float16", "float32", "tf32")
DIMS = (64, 128, 256, 512, 1024, 2048)
SHARED_KIB = {80: 163, 86: 99, 90: 227, 100: 227}
"""Shared memory that one program may have, by architecture."""
TENSOR_MEMORY_COLUMNS = 512  # of a multiprocessor from sm_100 on, where products accumulate
MULTIPROCESSOR = {80: (164, 64), 86: (100, 48), 90: (228, 64), 100: (228, 64)}
"""KiB of shared memory, of which each program has one taken off, and warps; 65,536 registers."""
# Of a multiprocessor in a clock: multiply-adds of 16 bits; for all, 16 exponentials and 128 instructions.
MACS = {80: 1024, 86: 512, 90: 2048, 100: 4096}
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
TENSOR_CORES = {"HMMA": "mma.sync", "HGMMA": "wgmma", "UTC": "tcgen05"}
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
    """What came of it: a row of the CSV. Loops are told apart as in sass.py; None: no main loop."""

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
    def faults(self) -> list[str]:
        """Why the kernel must not ship."""
        if self.failure:
            return [f"cannot be compiled or read: {self.failure}"]
        found = []
        if self.spilled_bytes:
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


def merged(rows: Sequence[Compiled], known: Sequence[Compiled]) -> list[Compiled]:
    """All that is shipped, in its order, of what is new and what still holds of the rest."""
    by_key = {row.key: row for row in (*known, *rows)}
    sources = shipped(DTYPES, DIMS, tuple(SHARED_KIB))
    found = [(by_key[source.key], source) for source in sources if source.key in by_key]
    return [row for row, source in found if row.fingerprint == fingerprint(source)]


def compile_all(
    sources: Sequence[Source], num_jobs: int, known: Sequence[Compiled] = ()
) -> list[Compiled]:
    """The rows in the order of the sources; what is known of the same code is not compiled again."""
    rows = {row.fingerprint: row for row in known if not row.failure}
    wanted = {fingerprint(source): source for source in sources}
    missing = {key: source for key, source in wanted.items() if key not in rows}
    with tempfile.TemporaryDirectory() as cache, contextlib.ExitStack() as stack:
        if num_jobs == 1:
            _start_worker(cache)
            found = map(compile_one, missing.values())
        else:
            pool = ProcessPoolExecutor(num_jobs, initializer=_start_worker, initargs=(cache,))
            found = stack.enter_context(pool).map(compile_one, missing.values(), chunksize=4)
        rows |= dict(zip(missing, found))
    return [
        replace(rows[fingerprint(s)], **{name: getattr(s, name) for name in TOLD_APART})
        for s in sources
    ]


def _start_worker(cache: str) -> None:
    from triton import knobs

    knobs.cache.dir = cache
    knobs.compilation.always_compile = True  # what is cached has no log of ptxas
    knobs.nvidia.dump_ptxas_log = True


def fingerprint(source: Source) -> str:
    """Of all that decides what is compiled: the code with what it calls, the launch, the compiler."""
    import triton

    launch = replace(source.launch, grid=())
    code = _code(source.module, launch.kernel)
    text = f"{launch}\n{code}\n{source.arch} {triton.__version__}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _code(module: str, name: str) -> str:
    return _code_of(name, vars(importlib.import_module(module))[name])


@functools.cache
def _code_of(name: str, value: Any) -> str:
    """A kernel without its comments and docstring, and every function or constant that it names."""
    if not hasattr(value, "raw_src"):
        return f"{name} = {value!r}"
    tree = ast.parse(textwrap.dedent("".join(value.raw_src)))
    (function,) = tree.body
    assert isinstance(function, ast.FunctionDef)
    if ast.get_docstring(function):
        function.body = function.body[1:]
    space = value.fn.__globals__
    used = sorted({n.id for n in ast.walk(function) if isinstance(n, ast.Name)} - {name})
    own = [n for n in used if _is_of_kernels(space.get(n))]
    return "\n".join([ast.unparse(tree), *(_code_of(n, space[n]) for n in own)])


def _is_of_kernels(value: object) -> bool:
    return hasattr(value, "raw_src") or type(value).__name__ in ("constexpr", "int", "float", "str")


def compile_one(source: Source) -> Compiled:
    """Compile for the architecture, wherever this runs, and read the result; or say what failed."""
    import triton

    launch = source.launch
    blank = Compiled(
        **{name: getattr(source, name) for name in TOLD_APART},
        kernel=launch.kernel,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        fingerprint=fingerprint(source),
        triton=triton.__version__,
    )
    with contextlib.redirect_stdout(io.StringIO()) as log:
        try:
            kernel = _compile(source)
            return _read(blank, kernel, log.getvalue())
        except Exception as failure:  # whatever the compiler raises is a finding
            lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
            where = " … ".join(dict.fromkeys((*lines[:1], *lines[-1:])))
            return replace(blank, failure=f"{type(failure).__name__}: {where}")


def _compile(source: Source) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget

    kernel = getattr(importlib.import_module(source.module), source.launch.kernel)
    return triton.compile(
        source_of(source.launch, kernel),
        target=GPUTarget("cuda", source.arch, 32),
        options=source.launch.options,
    )


def _read(blank: Compiled, kernel: Any, log: str) -> Compiled:
    code = kernel.asm
    instructions = sass.parse(_disassemble(code["cubin"]))
    loops = sass.main_loops(instructions, code["ttir"], code["ttgir"], blank.num_warps)
    main = loops[0] if loops else None
    opcodes = [i.opcode for i in instructions]
    kinds = [
        kind
        for prefix, kind in TENSOR_CORES.items()
        if any(sass.MATRIX.match(o) and o.startswith(prefix) for o in opcodes)
    ]
    registers = _only(r"Used (\d+) registers", log)
    return replace(
        blank,
        registers=registers,
        programs_per_multiprocessor=programs_of(
            blank.arch, registers, kernel.metadata.shared, blank.num_warps
        ),
        spilled_bytes=_only(r"(\d+) bytes spill stores", log)
        + _only(r"(\d+) bytes spill loads", log),
        shared_bytes=kernel.metadata.shared,
        tensor_memory_columns=getattr(kernel.metadata, "tmem_size", None) or 0,
        tensor_cores=" ".join(kinds),
        num_atomics=sum(1 for o in opcodes if sass.GLOBAL_ATOMIC.match(o)),
        is_pair_kernel=int("tt.dot" in code["ttir"]),
        macs_per_pair=main and main.macs,
        num_main_loops=len(loops),
        pairs_per_trip=main and main.pairs_per_trip,
        instructions_per_pair=main and main.instructions,
        peeled_instructions_per_pair=loops[-1].instructions if loops[1:] else None,
        ex2_per_pair=main and main.ex2,
        rcp_per_pair=main and main.rcp,
        compares_per_pair=main and main.compares,
        global_loads_per_trip=main and main.global_loads_per_trip,
        exponentials_in_flight=main and main.in_flight,
    )


def programs_of(arch: int, registers: int, shared_bytes: int, num_warps: int) -> int:
    """How many programs a multiprocessor holds at a time."""
    shared_kib, most_warps = MULTIPROCESSOR[arch]
    by_registers = 65536 // (-(-registers // 8) * 8 * sass.WARP * num_warps)
    by_memory = shared_kib * 1024 // (shared_bytes + 1024)
    return min(by_registers, by_memory, most_warps // num_warps)


def _disassemble(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-sass", file.name], capture_output=True, text=True
        )
    if not done.stdout.strip():
        raise ValueError(f"cuobjdump said nothing but {done.stderr.strip()!r}")
    return done.stdout


def _only(pattern: str, log: str) -> int:
    found = re.findall(pattern, log)
    if len(found) != 1:
        raise ValueError(f"expected one {pattern!r} in the log of ptxas, got {len(found)}:\n{log}")
    return int(found[0])


# --- the command


def main(argv: Sequence[str] | None = None) -> int:
    args = _make_parser().parse_args(argv)
    is_peers = args.peers is not None
    csv_path = args.output or RESULTS / ("gpu_codegen_peers.csv" if is_peers else "gpu_codegen.csv")
    known = read_rows(csv_path, Compiled) if args.resume and csv_path.exists() else []
    rows = read_rows(csv_path, Compiled) if args.table else _compile_wanted(args, known)
    print(full_table(rows))
    is_stale = False
    if args.check:
        is_stale = differs_from(csv_path, rows)
    elif not args.table:
        write_rows(csv_path, merged(rows, known) if args.resume else rows)
        _say(f"wrote {csv_path}")
    if args.update_docs or args.check:
        is_stale |= update_docs(args.docs, only_check=args.check)
    faults = [(row, fault) for row in rows if not is_peers for fault in row.faults]
    for row, fault in faults:
        _say(f"FAULT: {_name(row)} {fault}")
    _say(f"{len(rows)} kernels, {len(faults)} faults")
    return int(bool(faults) or is_stale)


def _compile_wanted(args: argparse.Namespace, known: Sequence[Compiled]) -> list[Compiled]:
    if args.peers:
        from peer_kernels import peer_sources

        sources = peer_sources(args.peers, args.dims, args.archs)
    else:
        sources = shipped(args.dtypes, args.dims, args.archs)
        sources = [source for source in sources if re.search(args.labels, source.label)]
    machine = describe_machine("cpu")
    origin = {name: machine[name] for name in ("commit", "dirty")}
    # What is known has this commit's fingerprint, so it is a row of this commit as well.
    return [replace(row, **origin) for row in compile_all(sources, args.jobs, known)]


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what is compiled")
    what.add_argument("--dtypes", type=_names, default=DTYPES, help="as bfloat16,float32")
    what.add_argument("--dims", type=ints, default=DIMS, help="as 64,128")
    what.add_argument("--archs", type=ints, default=tuple(SHARED_KIB), help="as 80,90")
    what.add_argument("--labels", default="", metavar="REGEX", help="only labels with it: out/all$")
    what.add_argument(
        "--peers",
        type=Path,
        metavar="DIR",
        help="instead: the peers' kernels, from pip install --no-deps --target DIR memeff==0.3.1 inf-cl==1.2.1",
    )
    what.add_argument(
        "--resume",
        action="store_true",
        help="compile only what changed since the CSV, and keep its other rows",
    )
    what.add_argument("--jobs", type=int, default=2, help="processes that compile")
    out = parser.add_argument_group("what becomes of it")
    out.add_argument("--output", type=Path, metavar="CSV", help="None: in benchmarks/results")
    out.add_argument("--table", action="store_true", help="compile nothing, show the CSV")
    out.add_argument(
        "--update-docs", action="store_true", help="renew the tables in gpu.md, kernels.md"
    )
    out.add_argument("--docs", type=Path, default=DOCS, help="the folder that holds both")
    out.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit 1 where the CSV (of the same Triton) or a document differs",
    )
    return parser


def ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _name(row: Compiled) -> str:
    return f"{row.label} ({row.kernel}), {row.dtype}, D={row.dim}, sm_{row.arch}"


def differs_from(csv_path: Path, rows: Sequence[Compiled]) -> bool:
    """Whether the CSV says something else of these kernels, or nothing; another Triton may."""
    all_known = read_rows(csv_path, Compiled)
    known = {row.key: row for row in all_known}
    outdated = len(all_known) - len(merged([], all_known))
    if outdated and rows and all_known[0].triton == rows[0].triton:
        _say(f"STALE: {outdated} rows of {csv_path.name} are of other code than is shipped now")
        return True
    told = {f.name for f in fields(Compiled)} - {"commit", "dirty"}
    differs = False
    for row in rows:
        old = known.get(row.key)
        if old is not None and old.triton != row.triton:
            continue
        changed = [n for n in told if old is None or _cell(old, n) != _cell(row, n)]
        if changed:
            _say(f"STALE: {csv_path.name} on {_name(row)}: {', '.join(sorted(changed))}")
            differs = True
    return differs


def _cell(row: Compiled, name: str) -> object:
    value = getattr(row, name)
    return f"{value:.6g}" if isinstance(value, float) else value


def update_docs(docs: Path, only_check: bool) -> bool:
    """Make the documents' tables say what the committed rows say, or only look."""
    from peer_kernels import peers_block

    ours = read_rows(RESULTS / "gpu_codegen.csv", Compiled)
    peers = read_rows(RESULTS / "gpu_codegen_peers.csv", Compiled)
    differs = [
        update_document(docs / "gpu.md", "gpu_codegen", codegen_block(ours), only_check),
        update_document(
            docs / "kernels.md", "gpu_codegen_peers", peers_block([*ours, *peers]), only_check
        ),
    ]
    if any(differs) and only_check:
        _say(f"{docs}: its tables differ from the CSVs")
    return any(differs)


def codegen_block(rows: Sequence[Compiled]) -> str:
    """What was compiled altogether, then the pair kernels at the dimension of the comparison."""
    num_shipped = len(shipped(DTYPES, DIMS, tuple(SHARED_KIB)))
    num_faulty = sum(1 for row in rows if row.faults)
    fullest = max(rows, key=lambda row: row.shared_bytes / SHARED_KIB[row.arch])
    summary = (
        f"{len(rows)} of the {num_shipped} kernels that can be launched, by Triton "
        f"{rows[0].triton}: {num_faulty} with a fault, "
        f"{sum(row.spilled_bytes for row in rows)} bytes spilled, "
        f"{sum(row.num_atomics for row in rows)} atomics, at most "
        f"{max(row.registers for row in rows)} registers; the nearest to its architecture's "
        f"shared memory needs {fullest.shared_bytes / 1024:.0f} of {SHARED_KIB[fullest.arch]} KiB "
        f"(D={fullest.dim}, sm_{fullest.arch})."
    )
    header = ["kernel", "sm", "registers", "shared KiB", "tensor cores", "instructions"]
    header += ["own tiles", "ex2", "in flight", "programs", "clocks"]
    at_128 = [r for r in rows if (r.dtype, r.dim, r.is_pair_kernel) == ("bfloat16", 128, 1)]
    shown = [row for row in at_128 if "out/all" in row.label]
    cells = [
        [
            *(row.label, str(row.arch), str(row.registers), f"{row.shared_bytes / 1024:.0f}"),
            *(row.tensor_cores, digits(row.instructions_per_pair)),
            *(digits(row.peeled_instructions_per_pair), digits(row.ex2_per_pair)),
            *(digits(row.exponentials_in_flight), str(row.programs_per_multiprocessor)),
            digits(row.tile_clocks and round(row.tile_clocks)),
        ]
        for row in shown
    ]
    summary += "".join(
        f"\n- FAULT: {_name(row)} {'; '.join(row.faults)}" for row in rows if row.faults
    )
    return (
        f"{summary}\n\n{_table_of_counts(rows)}\n\nThe kernels over pairs of the default loss, "
        f"bfloat16, D=128:\n\n{render_table([header, *cells], True)}"
    )


def _table_of_counts(rows: Sequence[Compiled]) -> str:
    """How many kernels of each kind are among the rows."""
    found = Counter((row.dtype, row.dim, row.arch) for row in rows)
    cells = [
        [dtype, str(dim), *(str(found[dtype, dim, arch]) for arch in SHARED_KIB)]
        for dtype, dim in dict.fromkeys((row.dtype, row.dim) for row in rows)
    ]
    header = ["dtype", "D", *(f"kernels on sm_{arch}" for arch in SHARED_KIB)]
    return render_table([header, *cells], True)


def full_table(rows: Sequence[Compiled]) -> str:
    header = ["kernel", "dtype", "D", "sm", "regs", "spilled", "KiB", "tensor cores", "atomics"]
    header += ["instr/pair", "peeled", "ex2", "rcp", "compares", "loads/trip"]
    cells = [
        [
            *(row.label, row.dtype, str(row.dim), str(row.arch), str(row.registers)),
            *(str(row.spilled_bytes), f"{row.shared_bytes / 1024:.1f}", row.tensor_cores),
            *(str(row.num_atomics), digits(row.instructions_per_pair)),
            *(digits(row.peeled_instructions_per_pair), digits(row.ex2_per_pair)),
            *(digits(row.rcp_per_pair), digits(row.compares_per_pair)),
            digits(row.global_loads_per_trip),
        ]
        for row in rows
    ]
    return render_table([header, *cells], markdown=False)


def digits(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}".rstrip("0").rstrip(".")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
