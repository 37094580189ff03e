"""Compiles launches ahead of time, on any machine, and reads the machine code into rows."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib
import io
import re
import subprocess
import tempfile
import textwrap
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

from codegen import sass
from codegen.chips import programs_of
from codegen.kernels import TOLD_APART, Compiled, Source
from supcon_kernels.triton_run import source_of
from supcon_kernels.triton_tiles import padded_dim

# Kernels whose last program adds up what all have written, in an order that is always the same.
COUNTED = ("_loss_kernel",)
TENSOR_CORES = {"HMMA": "mma.sync", "HGMMA": "wgmma", "UTC": "tcgen05"}


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
            found: Iterable[Compiled] = map(compile_one, missing.values())
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
    """Of all that decides a row: the code with what it calls, the launch, the width, the compiler."""
    import triton

    launch = replace(source.launch, grid=())  # type: ignore[arg-type]
    code = _code(source.module, launch.kernel)
    text = f"{launch}\n{code}\n{source.dim} {source.arch} {triton.__version__}"
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
    width = padded_dim(blank.dim)
    loops = sass.main_loops(instructions, code["ttir"], code["ttgir"], blank.num_warps, width)
    opcodes = [i.opcode for i in instructions]
    kinds = [
        kind
        for prefix, kind in TENSOR_CORES.items()
        if any(sass.MATRIX.match(o) and o.startswith(prefix) for o in opcodes)
    ]
    registers = _only(r"Used (\d+) registers", log)
    row = replace(
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
        num_atomics=_num_atomics(blank.kernel, opcodes),
        is_pair_kernel=int("tt.dot" in code["ttir"]),
        num_main_loops=len(loops),
    )
    if not loops:
        return row
    main = loops[0]
    return replace(
        row,
        macs_per_pair=main.macs,
        pairs_per_trip=main.pairs_per_trip,
        instructions_per_pair=main.instructions,
        peeled_instructions_per_pair=loops[-1].instructions if loops[1:] else None,
        ex2_per_pair=main.ex2,
        rcp_per_pair=main.rcp,
        compares_per_pair=main.compares,
        spills_per_pair=main.spills,
        global_loads_per_trip=main.global_loads_per_trip,
        exponentials_in_flight=main.in_flight,
    )


def _num_atomics(kernel: str, opcodes: Sequence[str]) -> int:
    """Those on global memory, but for the one by which the programs of a kernel count themselves."""
    found = sum(1 for o in opcodes if sass.GLOBAL_ATOMIC.match(o))
    counts = sum(1 for o in opcodes if sass.COUNT.match(o))
    return found - int(kernel in COUNTED and counts == 1)


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
