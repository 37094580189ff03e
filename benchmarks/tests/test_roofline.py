"""The model of time on a card: counted by hand, and held against what was compiled."""

from __future__ import annotations

from dataclasses import replace

import pytest

from codegen import model
from codegen.kernels import Compiled, read_compiled
from measuring.workloads import Workload


def test_products_of_the_schemes() -> None:
    steps = {s.name: [s.products(p) for p in model.PHASES] for s in model.SCHEMES}
    assert steps == {"supcon_kernels": [1, 2], "memeff": [1, 4], "Inf-CL": [1, 4]}


def test_blocks_of_derivatives_are_written_and_read() -> None:
    ours, card = model.SCHEMES[0], model.find_card("NVIDIA H100")
    assert card is not None
    n = 8192
    wide = model.bound(ours, card, Workload(n, 1024, dtype="bfloat16"), "backward")
    assert wide.memory_us == pytest.approx(1e-3 * 2 * (2 * n * 1024 + 2 * n * n) / 3350)
    assert wide.matrix_us == pytest.approx(1e-6 * 2 * 2 * n * n * 1024 / 989.4)
    exact = model.bound(ours, card, Workload(n, 1024, dtype="float32"), "backward")
    product = 1e-6 * 2 * n * n * 1024
    assert exact.matrix_us == pytest.approx(product * (3 / 494.7 + 1 / 67))


def test_products_are_those_of_the_compiled_kernels() -> None:
    """The counts that the model takes from the source are in the IR of the kernels."""
    rows = {row.key: row for row in read_compiled()}
    for scheme in model.SCHEMES:
        for kernel in scheme.kernels:
            dtype = "bfloat16" if scheme.takes_16_bit else "float32"
            row = rows[scheme.package, kernel.label, dtype, 128, 90]
            assert row.macs_per_pair == 128 * (1 + kernel.gradients), kernel


def test_a_bound_by_hand() -> None:
    ours, card = model.SCHEMES[0], model.find_card("NVIDIA B200")
    assert card is not None
    bound = model.bound(ours, card, Workload(8192, dtype="bfloat16"), "forward")
    assert bound.matrix_us == pytest.approx(2 * 8192**2 * 128 / 2250e12 * 1e6)
    assert bound.exponential_us == pytest.approx(8192**2 / (16 * 148 * 1.86e9) * 1e6)
    # One program a multiprocessor: one after another, behind the launch.
    assert bound.serial_us == pytest.approx(bound.matrix_us + bound.exponential_us)
    assert bound.least_us == pytest.approx(model.LAUNCH_US + bound.serial_us)
    assert (bound.programs, bound.limit) == (1, "serial")
    assert bound.kind == "model, not measured"
    small = model.bound(ours, card, Workload(64, dtype="bfloat16"), "forward")
    assert small.limit == "launch"
    backward = model.bound(ours, card, Workload(8192), "backward")
    assert backward.matrix_us == pytest.approx(2 * 3 * 2 * 8192**2 * 128 / 1125e12 * 1e6)


def test_programs_of_a_multiprocessor_overlap_down_to_the_slowest_unit() -> None:
    ours, card = model.SCHEMES[0], model.find_card("NVIDIA H100 80GB HBM3")
    assert card is not None and card.name == "H100"
    blank = Compiled("supcon_kernels", "forward out/all", "", "bfloat16", 128, 90, 8, 3, "", "")
    row = replace(blank, registers=100, shared_bytes=128 * 1024, instructions_per_pair=4.0)

    def forward(**changes: object) -> model.Bound:
        call = Workload(8192, dtype="bfloat16")
        return model.bound(ours, card, call, "forward", [replace(row, **changes)])

    alone, two = forward(), forward(shared_bytes=80 * 1024)
    units = (alone.matrix_us, alone.exponential_us, alone.instruction_us)
    assert alone.programs == 1
    assert alone.least_us == pytest.approx(model.LAUNCH_US + sum(units))
    assert two.programs == 2
    assert two.least_us == pytest.approx(model.LAUNCH_US + max(*units, sum(units) / 2))
    assert forward(shared_bytes=16 * 1024, registers=32).limit in ("matrix", "exponential")
    assert forward(shared_bytes=16 * 1024, registers=255).programs == 1


def test_measured_rates_replace_published_ones() -> None:
    card = model.find_card("NVIDIA H200")
    assert card is not None and card.bandwidth_gbs == 4800
    rates = {"bfloat16 product": 790.0, "exponentials": 4.0, "copy": 4300.0}
    measured = model.with_rates(card, rates)
    assert measured.matrix_tflops == {"16-bit": 790.0, "tf32": 494.7, "float32": 67}
    bound = model.bound(model.SCHEMES[0], measured, Workload(8192, dtype="bfloat16"), "forward")
    assert bound.matrix_us == pytest.approx(2 * 8192**2 * 128 / 790e12 * 1e6)
    assert bound.exponential_us == pytest.approx(8192**2 / 4e12 * 1e6)
    assert bound.memory_us == pytest.approx(8192 * 128 * 2 / 4300e9 * 1e6)
    assert model.with_rates(card, {}) == card


def test_a_card_that_is_not_in_the_table_has_no_bound() -> None:
    assert model.find_card("NVIDIA GeForce RTX 4090") is None
