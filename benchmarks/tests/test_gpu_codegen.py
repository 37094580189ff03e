"""gpu_codegen.py must be able to say no: loops, spills, atomics, stale tables.

The kernels here are compiled for real chips, on the CPU; none of them runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import triton
import triton.language as tl

import gpu_codegen
from codegen import compiler, sass
from codegen.compiler import compile_all
from codegen.kernels import Compiled, Source, shipped
from reporting.documents import update_document
from reporting.rows import read_rows, write_rows
from supcon_kernels.triton_launch import Launch

SPIN_BEHIND_THE_END = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;               /* 0x0 */
        /*0010*/              @!P0 BRA 0x0070 ;                         /* 0x0 */
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R4 ; /* 0x0 */
        /*0030*/              @!P1 BRA 0x0080 ;                         /* 0x0 */
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ; /* 0x0 */
        /*0050*/                   MUFU.EX2 R2, R3 ;                    /* 0x0 */
        /*0060*/               @P2 BRA 0x0020 ;                         /* 0x0 */
        /*0070*/                   EXIT ;                               /* 0x0 */
        /*0080*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R4 ; /* 0x0 */
        /*0090*/              @!P1 BRA 0x0080 ;                         /* 0x0 */
        /*00a0*/                   BRA 0x0040 ;                         /* 0x0 */
        /*00b0*/                   BRA 0x00b0;                          /* 0x0 */
"""


LEFT_BY_A_CALL = """
        /*0000*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ; /* 0x0 */
        /*0010*/               @P0 CALL.REL.NOINC 0x0030 ;              /* 0x0 */
        /*0020*/                   BRA 0x0000 ;                         /* 0x0 */
        /*0030*/                   MUFU.EX2 R2, R3 ;                    /* 0x0 */
        /*0040*/              @!P1 BRA 0x0000 ;                         /* 0x0 */
        /*0050*/                   EXIT ;                               /* 0x0 */
"""


@triton.jit
def forward(rows, out, num_cols, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A ten-line forward: what the counts of the tool are held against."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D)
    own = tl.load(rows + i[:, None] * D + d[None, :])
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, num_cols, COLS):
        j = start + tl.arange(0, COLS)
        col = tl.load(rows + j[:, None] * D + d[None, :])
        total += tl.exp2(tl.dot(own, col.T))
    tl.store(out + i, tl.sum(total, 1))


@triton.jit
def in_slices(rows, out, num_cols, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The same with an inner loop over slices of D, which no compiler unrolls."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, num_cols, COLS):
        j = start + tl.arange(0, COLS)
        score = tl.zeros((ROWS, COLS), tl.float32)
        for low in tl.range(0, D, 32, disallow_acc_multi_buffer=True):
            d = low + tl.arange(0, 32)
            own = tl.load(rows + i[:, None] * D + d[None, :])
            col = tl.load(rows + j[:, None] * D + d[None, :])
            score = tl.dot(own, col.T, score)
        total += tl.exp2(score)
    tl.store(out + i, tl.sum(total, 1))


@triton.jit
def with_atomic(rows, out, num_cols, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D)
    own = tl.load(rows + i[:, None] * D + d[None, :])
    for start in range(0, num_cols, COLS):
        j = start + tl.arange(0, COLS)
        col = tl.load(rows + j[:, None] * D + d[None, :])
        tl.atomic_add(out + j, tl.sum(tl.exp2(tl.dot(own, col.T)), 0))


@triton.jit
def without_tensor_cores(
    rows, out, num_cols, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """float32 in full precision has none: a 16-bit kernel like it must be refused."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D)
    own = tl.load(rows + i[:, None] * D + d[None, :]).to(tl.float32)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, num_cols, COLS):
        j = start + tl.arange(0, COLS)
        col = tl.load(rows + j[:, None] * D + d[None, :]).to(tl.float32)
        total += tl.exp2(tl.dot(own, col.T, input_precision="ieee"))
    tl.store(out + i, tl.sum(total, 1))


def source(kernel, arch: int = 90, dim: int = 128, tile: int = 128, warps: int = 8) -> Source:
    launch = Launch(
        kernel=kernel.__name__,
        signature={"rows": "*bf16", "out": "*fp32", "num_cols": "i32"},
        constexprs={"D": dim, "ROWS": tile, "COLS": tile},
        divisible_by_16=("rows", "out", "num_cols"),
        num_warps=warps,
        num_stages=2,
        grid=(1,),
    )
    return Source("here", __name__, kernel.__name__, "bfloat16", dim, arch, launch)


def compiled(*args, **options) -> Compiled:
    (row,) = compile_all([source(*args, **options)], 1)
    assert not row.failure, row.failure
    return row


# --- reading the disassembly


def test_a_spin_loop_behind_the_end_is_no_loop_of_its_own_body() -> None:
    nest = sass.loop_nest(sass.parse(SPIN_BEHIND_THE_END))
    (main,) = nest.inner
    assert {i.address for i in main.body} == {0x20, 0x30, 0x40, 0x50, 0x60, 0xA0}
    (spin,) = main.inner
    assert {i.address for i in spin.body} == {0x80, 0x90}
    assert {i.address for i in nest.body} == {0x00, 0x10, 0x70}  # the padding cannot be reached


def test_a_loop_may_be_left_by_a_call() -> None:
    # Two back edges to one header are one loop.
    (loop,) = sass.loop_nest(sass.parse(LEFT_BY_A_CALL)).inner
    assert [i.address for i in loop.body] == [0x00, 0x10, 0x20, 0x30, 0x40]


@pytest.mark.parametrize(
    ("opcode", "macs"),
    [
        ("HMMA.16816.F32.BF16", 2048),
        ("HMMA.1688.F32.TF32", 1024),
        ("HGMMA.64x128x16.F32.BF16", 32768),
        ("FFMA", 0),
    ],
)
def test_multiply_adds_of_a_warp(opcode: str, macs: int) -> None:
    assert sass.Instruction(0, "", opcode, "").warp_macs == macs


@pytest.mark.parametrize(
    ("arch", "tensor_cores"), [(80, "mma.sync"), (90, "wgmma"), (100, "tcgen05")]
)
def test_a_plain_forward(arch: int, tensor_cores: str) -> None:
    row = compiled(forward, arch)
    assert row.faults == []
    assert (row.tensor_cores, row.num_atomics, row.spilled_bytes) == (tensor_cores, 0, 0)
    assert row.macs_per_pair == 128
    assert (
        row.ex2_per_pair == 1
    )  # counted apart from the matrix instructions that pairs follow from
    assert row.rcp_per_pair == 0
    assert 2 < row.instructions_per_pair < 5


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_slices_of_the_features_count_as_often_as_they_run(arch: int) -> None:
    row = compiled(in_slices, arch, dim=256)
    assert row.ex2_per_pair == 1
    assert row.macs_per_pair == 256
    assert row.instructions_per_pair > compiled(forward, arch).instructions_per_pair


# --- the gate


def test_a_spill_is_a_fault() -> None:
    row = compiled(forward, 80, tile=64, warps=1)
    assert "spills" in " ".join(row.faults) and row.spills_per_pair
    few = replace(row, spills_per_pair=0.5)
    assert not any("spills" in fault for fault in few.faults)


def test_an_atomic_is_a_fault() -> None:
    for arch in (80, 90):
        row = compiled(with_atomic, arch)
        assert any("atomics" in fault for fault in row.faults), row


def test_only_the_loss_kernel_may_count_its_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    found = shipped(["bfloat16"], [128], [90])
    loss = next(each for each in found if each.label == "loss out/all, mean")
    assert compile_all([loss], 1)[0].faults == []
    monkeypatch.setattr(compiler, "COUNTED", ())
    assert compile_all([loss], 1)[0].faults == ["holds 1 atomics"]


def test_16_bits_without_tensor_cores_are_a_fault() -> None:
    assert "uses no tensor cores" in compiled(without_tensor_cores, 80, tile=32).faults


def test_too_much_shared_memory_is_a_fault() -> None:
    row = compiled(forward, 86, dim=256)
    assert any("of 99 KiB" in fault for fault in row.faults), row


def test_more_instructions_than_the_goal_are_a_fault() -> None:
    row = replace(compiled(forward, 90), label="forward out/all")
    assert row.faults == []
    assert "instructions" in replace(row, instructions_per_pair=8.1).faults[0]
    assert "rcp" in replace(row, rcp_per_pair=0.5).faults[0]


def test_what_does_not_compile_is_a_fault() -> None:
    bad = source(forward)
    bad = replace(bad, launch=replace(bad.launch, constexprs={"D": 100, "ROWS": 64, "COLS": 64}))
    (row,) = compile_all([bad], 1)
    assert "cannot be compiled" in row.faults[0]


@pytest.fixture
def shipped_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Source]]:
    """What the command takes for shipped."""
    sources = [source(forward)]
    monkeypatch.setattr(gpu_codegen, "shipped", lambda *args: sources)
    yield sources


def test_the_command_exits_1_for_a_fault_and_knows_what_it_has(
    shipped_kernel: list[Source], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--jobs", "1", "--output", str(tmp_path / "rows.csv")]
    assert gpu_codegen.main(run) == 0
    rows = read_rows(tmp_path / "rows.csv", Compiled)
    assert [row.label for row in rows] == ["forward"]
    shipped_kernel.append(source(with_atomic))
    assert gpu_codegen.main(run) == 1
    assert "FAULT: with_atomic" in capsys.readouterr().err


def test_a_csv_that_says_something_else_is_stale(
    shipped_kernel: list[Source], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = compile_all(shipped_kernel, 1)
    write_rows(tmp_path / "rows.csv", rows)
    assert not gpu_codegen.differs_from(tmp_path / "rows.csv", rows, shipped_kernel)
    assert gpu_codegen.differs_from(
        tmp_path / "rows.csv", [replace(rows[0], registers=1)], shipped_kernel
    )
    assert "registers" in capsys.readouterr().err
    assert gpu_codegen.differs_from(
        tmp_path / "rows.csv", [replace(rows[0], label="new")], shipped_kernel
    )
    other = [replace(rows[0], registers=1, triton="0.0")]
    assert not gpu_codegen.differs_from(tmp_path / "rows.csv", other, shipped_kernel)


def test_a_document_is_found_stale_and_renewed(tmp_path: Path) -> None:
    document = tmp_path / "gpu.md"
    document.write_text("before\n<!-- rows:begin -->\nold\n<!-- rows:end -->\nafter\n")
    assert update_document(document, "rows", "new", only_check=True)
    assert "old" in document.read_text()
    assert update_document(document, "rows", "new", only_check=False)
    assert document.read_text() == "before\n<!-- rows:begin -->\nnew\n<!-- rows:end -->\nafter\n"
    assert not update_document(document, "rows", "new", only_check=True)
    with pytest.raises(ValueError, match="needs one"):
        update_document(document, "others", "new", only_check=True)


def test_rows_are_kept_that_still_hold(shipped_kernel: list[Source], tmp_path: Path) -> None:
    shipped_kernel.append(source(in_slices))
    path = tmp_path / "rows.csv"
    first, second = compile_all(shipped_kernel, 1)
    write_rows(path, [first, second, replace(first, label="no longer shipped")])
    run = ["--jobs", "1", "--output", str(path), "--resume", "--labels", "forward"]
    assert gpu_codegen.main(run) == 0
    rows = read_rows(path, Compiled)
    assert [row.label for row in rows] == ["forward", "in_slices"]
    assert rows[1].fingerprint == second.fingerprint
    write_rows(path, [first, replace(second, fingerprint="of other code")])
    assert gpu_codegen.main(run) == 0
    assert [row.label for row in read_rows(path, Compiled)] == ["forward"]


def test_rows_of_the_peers_are_held_against_the_peers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_codegen, "update_docs", lambda *args, **options: False)
    monkeypatch.setattr(gpu_codegen, "peer_sources", lambda *args: [source(forward)])
    run = ["--jobs", "1", "--output", str(tmp_path / "peers.csv"), "--peers", str(tmp_path)]
    assert gpu_codegen.main(run) == 0
    assert gpu_codegen.main([*run, "--resume"]) == 0
    assert [row.label for row in read_rows(tmp_path / "peers.csv", Compiled)] == ["forward"]
    assert gpu_codegen.main([*run, "--check"]) == 0


def test_the_same_code_is_not_compiled_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    known = compile_all([source(forward)], 1)
    monkeypatch.setattr(compiler, "compile_one", None)
    assert compile_all([source(forward)], 1, known) == known
    assert compiler.fingerprint(source(forward)) != compiler.fingerprint(source(in_slices))
    assert compiler.fingerprint(source(forward)) != compiler.fingerprint(source(forward, 80))
