"""The rows of gpu_codegen.py as tables: the full one that it prints, and those of the documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from codegen.chips import SHARED_KIB
from codegen.kernels import DIMS, DTYPES, Compiled, distinct, shipped
from codegen.model import SCHEMES
from reporting.documents import render_table


def full_table(rows: Sequence[Compiled]) -> str:
    header = ["kernel", "dtype", "D", "sm", "regs", "spilled", "KiB", "tensor cores", "atomics"]
    header += ["instr/pair", "peeled", "ex2", "rcp", "compares", "spills", "loads/trip"]
    cells = [
        [
            *(row.label, row.dtype, str(row.dim), str(row.arch), str(row.registers)),
            *(str(row.spilled_bytes), f"{row.shared_bytes / 1024:.1f}", row.tensor_cores),
            *(str(row.num_atomics), digits(row.instructions_per_pair)),
            *(digits(row.peeled_instructions_per_pair), digits(row.ex2_per_pair)),
            *(digits(row.rcp_per_pair), digits(row.compares_per_pair)),
            *(digits(row.spills_per_pair), digits(row.global_loads_per_trip)),
        ]
        for row in rows
    ]
    return render_table([header, *cells], markdown=False)


def codegen_block(rows: Sequence[Compiled], earlier: Sequence[Compiled]) -> str:
    """What was compiled altogether, by two versions of Triton; then by the newest the pair kernels at the
    dimension of the comparison."""
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
    summaries = "\n\n".join(_summary(of_version) for of_version in (rows, earlier))
    return (
        f"{summaries}\n\n{_table_of_counts(rows)}\n\nThe kernels over pairs of the default loss, "
        f"bfloat16, D=128:\n\n{render_table([header, *cells], True)}"
    )


def _summary(rows: Sequence[Compiled]) -> str:
    """What one version of Triton compiled, each kernel counted once, and every fault."""
    possible = {source.key for source in distinct(shipped(DTYPES, DIMS, tuple(SHARED_KIB)))}
    kernels = [row for row in rows if row.key in possible]
    spilling = [row for row in kernels if row.spilled_bytes]
    fullest = max(kernels, key=lambda row: row.shared_bytes / SHARED_KIB[row.arch])
    return (
        f"{len(kernels):,} of the {len(possible):,} kernels that can be launched, by Triton "
        f"{rows[0].triton}: {sum(1 for row in kernels if row.faults)} with a fault, "
        f"{sum(row.num_atomics for row in kernels)} atomics, at most "
        f"{max(row.registers for row in kernels)} registers. {len(spilling)} spill, "
        f"{sum(row.spilled_bytes for row in spilling):,} bytes in all, and "
        f"{sum(1 for row in spilling if row.spills_per_pair)} of these in the main loop. The nearest "
        f"to its architecture's shared memory needs {fullest.shared_bytes / 1024:.0f} of "
        f"{SHARED_KIB[fullest.arch]} KiB (D={fullest.dim}, sm_{fullest.arch})."
        + "".join(
            f"\n- FAULT: {name_of(row)} {'; '.join(row.faults)}" for row in rows if row.faults
        )
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


def peers_block(rows: Sequence[Compiled], dim: int = 128) -> str:
    """Kernel by kernel on each architecture, and what a step does for a pair in all."""
    header = ["scheme", "sm", "kernel", "launches", "registers", "spilled bytes", "atomics"]
    header += ["products", "ex2", "rcp", "instructions"]
    found = {row.key: row for row in rows}
    cells = [header]
    for arch in sorted({row.arch for row in rows}):
        for scheme in SCHEMES:
            dtype = "bfloat16" if scheme.takes_16_bit else "float32"
            step = [(k, found[scheme.package, k.label, dtype, dim, arch]) for k in scheme.kernels]
            for kernel, row in step:
                cells.append(
                    [
                        *(scheme.name, str(arch), f"`{row.kernel}`", str(kernel.launches)),
                        *(str(row.registers), str(row.spilled_bytes), str(row.num_atomics)),
                        *(digits((row.macs_per_pair or 0) / dim), digits(row.ex2_per_pair)),
                        *(digits(row.rcp_per_pair), digits(row.instructions_per_pair)),
                    ]
                )
            cells.append(
                [
                    *(scheme.name, str(arch), "a step", "", "", "", ""),
                    *(
                        digits(sum(k.launches * _number(r, name) for k, r in step) / per)
                        for name, per in (
                            ("macs_per_pair", dim),
                            ("ex2_per_pair", 1),
                            ("rcp_per_pair", 1),
                            ("instructions_per_pair", 1),
                        )
                    ),
                ]
            )
    return render_table(cells, markdown=True)


def _number(row: Compiled, name: str) -> float:
    return getattr(row, name) or 0.0


def name_of(row: Compiled) -> str:
    return f"{row.label} ({row.kernel}), {row.dtype}, D={row.dim}, sm_{row.arch}"


def digits(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}".rstrip("0").rstrip(".")
