"""The Triton kernels run by Triton's interpreter: the numbers, not the speed.

The interpreter must be asked for before the kernels are imported, so tests/test_triton.py runs this
file in a process of its own. What an interpreter cannot show (registers, shared memory, tensor
cores) benchmarks/gpu_codegen.py does.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from cases import CASES, NOWHERE, VARIANTS, by_id
from compare import assert_close, dense_in_short_products, reference
from supcon_kernels import loss as loss_module
from supcon_kernels import (
    op,
    supcon_loss,
    triton_call,
    triton_launch,
    triton_run,
    triton_shares,
    triton_tiles,
    validation,
)
from supcon_kernels.backends.protocol import Anchors, Wanted
from supcon_kernels.problem import Problem

# The interpreter computes masked lanes too, of which some overflow.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
triton_loss = functools.partial(supcon_loss, backend="triton")


# --- against float64


def variants_of(case):
    """The losses that the backend takes a case with: none with a mask, one with soft labels."""
    arguments = case.arguments()
    labels = arguments.get("labels")
    is_soft = labels is not None and (labels.is_floating_point() or labels.dtype == torch.bool)
    return [] if "mask" in arguments else VARIANTS[:1] if is_soft else VARIANTS


def calls():
    """Each case in float32 with the default loss and one variant, in 16 bits with one of the two."""
    for k, case in enumerate(CASES):
        variants = variants_of(case)
        variants = [*variants[:1], *variants[k % len(VARIANTS) :][:1]]
        short = [torch.float16] if k % 5 else [torch.float16, torch.bfloat16]
        if case.id == "several_tiles":  # the slowest
            variants, short = variants[:1], []
        for variant in dict.fromkeys(variants):
            for dtype in [torch.float32, *(short if variant == variants[k // 6 % 2 - 1] else [])]:
                name = f"{case.id}-{'/'.join(variant)}-{dtype}"
                yield pytest.param(case, variant, dtype, id=name)


def arguments_of(name: str, variant: tuple[str, str]) -> dict:
    return {**by_id(name).arguments(), "summation": variant[0], "denominator": variant[1]}


def as_float32(arguments: dict) -> dict:
    return {k: v.float() if k.endswith("features") else v for k, v in arguments.items()}


@pytest.mark.parametrize("case, variant, dtype", list(calls()))
def test_every_case(case, variant, dtype):
    assert_close(triton_loss, arguments_of(case.id, variant), dtype)


def calls_of_wide_rows():
    """Each case with one variant."""
    for k, case in enumerate(CASES):
        if (variants := variants_of(case)) and case.id != "several_tiles":
            variant = variants[k % len(variants)]
            yield pytest.param(case, variant, id=f"{case.id}-{'/'.join(variant)}")


@pytest.mark.parametrize("case, variant", list(calls_of_wide_rows()))
def test_every_case_as_if_rows_were_wide(case, variant, monkeypatch):
    # As those of float32 are on an H100, whatever their width.
    monkeypatch.setattr(triton_launch, "is_wide", lambda *which: True)
    monkeypatch.setattr(triton_call, "_target", lambda device: triton_tiles.Target(0, 5))
    assert_close(triton_loss, arguments_of(case.id, variant), torch.float32)


@pytest.mark.parametrize("variant", VARIANTS, ids="/".join)
@pytest.mark.parametrize("name", ["relabelled_self_in_memory", "cold_twins", "cold_one_class"])
def test_every_variant(name, variant):
    assert_close(triton_loss, arguments_of(name, variant), torch.float32)


@pytest.mark.parametrize("variant", VARIANTS, ids="/".join)
def test_derivatives_that_cancel_but_for_their_rounding(variant):
    # Of one feature all similarities are alike, so that the same rounding counts in every pair.
    assert_close(triton_loss, arguments_of("one_feature", variant), torch.bfloat16)


def in_turn(*names):
    """Every variant, with one of the cases: all of their products take the interpreter minutes."""
    return list(zip(itertools.cycle(names), VARIANTS))


DEVICE_TEMPERATURES = [
    *in_turn("ragged", "self_in_memory", "unnormalised"),
    ("soft_memory", ("out", "all")),
]


@pytest.mark.parametrize("name, variant", DEVICE_TEMPERATURES, ids=str)
def test_a_temperature_that_the_host_does_not_read(name, variant, monkeypatch):
    # Both kernels are launched, and the device decides which of them goes to work.
    monkeypatch.setattr(triton_call, "_temperature", on_the_device)
    for tau in (0.1, 0.01):
        arguments = {**arguments_of(name, variant), "temperature": torch.tensor(tau)}
        assert_close(triton_loss, arguments, torch.float32)


@pytest.mark.parametrize("name", ["ragged", "self_in_memory", "half_empty_memory"])
def test_labels_that_are_sorted(name, monkeypatch):
    monkeypatch.setattr(triton_launch, "SORTED_PAIRS", 0)
    assert_close(triton_loss, arguments_of(name, ("out", "all")), torch.float32)


@pytest.mark.parametrize("name, variant", in_turn("memory", "two_views"), ids=str)
def test_columns_split_among_programs(name, variant, monkeypatch):
    whole = value_and_gradients(arguments_of(name, variant))
    monkeypatch.setattr(triton_call, "_target", lambda device: triton_tiles.Target(0, 64))
    monkeypatch.setattr(triton_shares, "MIN_SHARE", 1)
    arguments = arguments_of(name, variant)
    assert_close(triton_loss, arguments, torch.float32)
    split = value_and_gradients(arguments)
    for a, b in zip(whole, split):
        torch.testing.assert_close(a, b)


@pytest.fixture
def small_programs(monkeypatch):
    """Row kernels own few rows and look at few at a time, as they do of many; memory is dirty."""

    def dirty(call, shape, dtype=torch.float32):
        return torch.full(shape if isinstance(shape, tuple) else (shape,), 3, dtype=dtype)

    monkeypatch.setattr(triton_launch, "LOSS_ROWS", 32)
    monkeypatch.setattr(triton_launch, "MANY_ROWS", 1)
    monkeypatch.setattr(triton_launch, "PREPARE_WARPS", 1)
    monkeypatch.setattr(triton_call.Call, "new", dirty)
    triton_launch.plan_of.cache_clear()
    yield
    triton_launch.plan_of.cache_clear()


@pytest.mark.parametrize("name", ["ragged", "self_in_memory", "soft_labels"])
def test_rows_split_among_programs(name, small_programs):
    for reduction in ("mean", "none"):
        arguments = {**arguments_of(name, ("out", "all")), "reduction": reduction}
        assert_close(triton_loss, arguments, torch.float32)
    values = [value_and_gradients(arguments_of(name, ("out", "all"))) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*values))  # the count of programs begins again


@pytest.mark.parametrize("where", ["features", "contrast_features"])
def test_a_row_that_is_not_finite_reaches_the_losses_of_all_programs(where, small_programs):
    g = torch.Generator().manual_seed(0)
    arguments = {
        "features": torch.randn(140, 8, generator=g),
        "labels": torch.arange(140) % 7,
        "contrast_features": torch.randn(300, 8, generator=g),
        "contrast_labels": torch.arange(300) % 7,
    }
    arguments[where][-1, 3] = torch.nan
    assert triton_loss(**arguments, reduction="none").isnan().all()


def value_and_gradients(arguments: dict) -> list[torch.Tensor]:
    """The loss and the gradients, as bits may be compared."""
    arguments = as_float32(arguments)
    leaves = {k: v.clone().requires_grad_() for k, v in arguments.items() if k.endswith("features")}
    temperature = torch.tensor(0.1, requires_grad=True)
    loss = triton_loss(**{**arguments, **leaves, "temperature": temperature})
    return [loss.detach(), *torch.autograd.grad(loss, [*leaves.values(), temperature])]


def test_what_it_cannot_weigh_is_refused():
    for case in CASES:
        for summation, denominator in set(VARIANTS) - set(variants_of(case)):
            arguments = as_float32(case.arguments())
            with pytest.raises(ValueError, match="it takes "):
                triton_loss(**arguments, summation=summation, denominator=denominator)


def test_what_ignored_rows_hold_reaches_nothing():
    # 90 of the rows: whole tiles of them, and one shared with others.
    arguments = as_float32(by_id("ragged").arguments())
    arguments["labels"][:90] = NOWHERE
    expected = value_and_gradients(arguments)
    arguments["features"][:90] = torch.nan
    for got, want in zip(value_and_gradients(arguments), expected):
        assert torch.equal(got, want)


def test_rows_whose_squares_over_and_underflow():
    x = torch.randn(24, 20, generator=torch.Generator().manual_seed(0))
    norms = torch.tensor([3e38, 1e37, 1e19, 1e-19, 1e-38, 0.0])
    x[:6] = torch.nn.functional.normalize(x[:6]) * norms[:, None]
    labels = torch.arange(24) % 4
    leaves = x.requires_grad_(), x.detach().double().requires_grad_()
    losses = [
        supcon_loss(leaf, labels, backend=name)
        for leaf, name in zip(leaves, ("triton", "reference"))
    ]
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-6, atol=0)
    found, expected = (torch.autograd.grad(*pair)[0] for pair in zip(losses, leaves))
    for got, want in zip(found.double(), expected):
        assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_makes_the_loss_nan(bad):
    for name in ("two_views", "memory"):
        arguments = as_float32(by_id(name).arguments())
        key = "contrast_features" if name == "memory" else "features"
        arguments[key].view(-1)[5] = bad
        for variant in VARIANTS:
            options = {"summation": variant[0], "denominator": variant[1]}
            assert triton_loss(**arguments, **options).isnan()


def test_soft_labels_that_are_not_positive_make_all_nan(monkeypatch):
    monkeypatch.setattr(validation, "_readable", lambda x: False)
    for name in ("soft_labels", "soft_memory"):
        for bad in (-1.0, torch.nan):
            arguments = by_id(name).arguments()
            arguments["labels"][3, 1] = bad
            assert all(x.isnan().all() for x in value_and_gradients(arguments))


@pytest.mark.parametrize("has_memory", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_pairs_that_have_nearly_converged(dtype, has_memory):
    # A softmax of nearly 1 and an attraction of 1: rounded to 16 bits apart, nothing true is left.
    g = torch.Generator().manual_seed(0)
    features, labels = torch.randn(100, 64, generator=g), torch.arange(100)
    other = features + 0.7 * torch.randn(100, 64, generator=g)
    if has_memory:
        leaves = {"features": features, "contrast_features": other}
        options = {"labels": labels, "contrast_labels": labels, "temperature": 0.05}
    else:
        leaves = {"features": torch.cat([features, other])}
        options = {"labels": labels.repeat(2), "temperature": 0.05}

    def gradients(loss_function, dtype):
        inputs = {k: v.to(dtype).requires_grad_() for k, v in rounded.items()}
        loss = loss_function(**inputs, **options)
        return [x.double() for x in torch.autograd.grad(loss, list(inputs.values()))]

    rounded = {k: v.to(dtype) for k, v in leaves.items()}
    exact = gradients(reference, torch.float64)
    dense = gradients(dense_in_short_products, dtype)
    for ours, want, like in zip(gradients(triton_loss, dtype), exact, dense):
        assert (ours - want).abs().max() < 3 * (like - want).abs().max()


# --- the rows of a rank among those of all


@pytest.mark.parametrize("variant", [("out", "all"), ("in", "one_positive")], ids="/".join)
def test_own_rows_among_all(variant):
    g = torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 24, generator=g), torch.randint(4, (60,), generator=g)
    problem = dataclasses.replace(
        problem_of(features, labels), summation=variant[0], denominator=variant[1]
    )
    tau = torch.tensor(0.5)
    whole = dataclasses.replace(problem, temperature_tensor=tau)
    found = op.results_of(whole, "triton", "sum")
    wanted = Wanted(rows=True, temperature=True)
    every = Anchors(torch.tensor(0.25), found.divisor, found.stats, found.prepared)
    want = op.gradients_of(whole, every, None, wanted, "triton")
    own = slice(0, 25)
    among_all = dataclasses.replace(
        whole, rows=features[own], row_labels=labels[own], cols=features, col_labels=labels
    )
    of_own = op.results_of(among_all, "triton", "sum")
    torch.testing.assert_close(of_own.stats, found.stats[:, own])
    for prepared in (of_own.prepared, None):
        mine = every._replace(stats=of_own.stats, prepared=prepared)
        grads = op.gradients_of(among_all, mine, every, wanted, "triton")
        torch.testing.assert_close(grads.rows, want.rows[own], rtol=1e-4, atol=1e-6)
    others = dataclasses.replace(
        whole,
        rows=features[25:],
        row_labels=labels[25:],
        cols=features[own],
        col_labels=labels[own],
    )
    others = dataclasses.replace(others, self_offset=None)
    of_others = every._replace(stats=found.stats[:, 25:], prepared=None)

    def block(problem, anchors, wanted):
        return op.gradients_of(problem, anchors, None, wanted, "triton")

    rest = block(others, of_others, Wanted(cols=True, temperature=True))
    against = dataclasses.replace(
        among_all, cols=features[own], col_labels=labels[own], self_offset=0
    )
    blocks = block(against, mine, Wanted(True, True, True))
    both = dataclasses.replace(among_all, cols=features[25:], col_labels=labels[25:])
    both = dataclasses.replace(both, self_offset=None)
    theirs = block(both, mine, Wanted(rows=True))
    # As anchors and as contrasts, block by block.
    total = blocks.rows + blocks.cols + rest.cols + theirs.rows
    torch.testing.assert_close(total, want.rows[own], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["ragged", "self_in_memory", "two_views", "symmetric_memory"])
def test_the_operator_is_registered_as_it_works(name):
    arguments = as_float32(by_id(name).arguments())
    built = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "forward", lambda *operands: built.append(operands) or (torch.zeros(()),))
        triton_loss(**arguments)
    operands = tuple(
        x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in built[0]
    )
    torch.library.opcheck(op.forward, operands, test_utils=("test_schema", "test_faketensor"))
    loss, *saved = op.forward(*operands)
    call = (torch.ones_like(loss), *saved, True, operands[1] is not None, False)
    call = (*call, *operands[:-1])
    fixed = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in call)
    torch.library.opcheck(op.backward, fixed, test_utils=("test_schema", "test_faketensor"))


# --- launches


def launches_of(call) -> list[str]:
    """What a call asks a device to do: kernels, and PyTorch's operators that are no views."""
    call()  # what is made once is made
    with torch.profiler.profile() as profile:
        call()
    return [name for event in profile.events() if event.cpu_parent is None for name in work(event)]


def work(event) -> list[str]:
    """The leaves under a profiled operator that are neither views nor allocations."""
    if event.name.startswith("launch "):
        return [event.name]
    inner = [name for child in event.cpu_children for name in work(child)]
    allocates = "empty" in event.name or "resize" in event.name
    if inner or allocates or not event.name.startswith("aten::"):
        return inner
    packet = getattr(torch.ops.aten, event.name.removeprefix("aten::"))
    is_view = any(getattr(packet, overload).is_view for overload in packet.overloads())
    return [] if is_view else [event.name]


# The host reads what a device has computed.
WAITS = {f"aten::{name}" for name in ("_local_scalar_dense", "nonzero", "equal", "bincount")}


def launch_cases():
    """Arguments of a call, changes to what is around it, and the most launches that it may have."""
    views, rows, memory = torch.randn(16, 2, 8), torch.randn(16, 8), torch.randn(20, 8)
    labels, of_memory = torch.arange(16) % 4, torch.arange(20) % 4
    yield pytest.param({"features": rows, "labels": labels}, 8, id="labels")
    yield pytest.param({"features": views}, 8, id="views")
    labelled = {"features": views, "labels": labels}
    yield pytest.param(labelled, 8, id="labelled views")
    yield pytest.param({**labelled, "reduction": "sum"}, 8, id="sum")
    yield pytest.param({**labelled, "base_temperature": 0.07}, 10, id="SupConLoss")
    yield pytest.param({**labelled, "temperature": torch.tensor(0.1)}, 10, id="learned temperature")
    for summation, denominator in VARIANTS[1:]:
        variant = {"summation": summation, "denominator": denominator}
        yield pytest.param({**labelled, **variant}, 10, id=f"{summation}/{denominator}")
    rectangle = {"contrast_features": memory, "contrast_labels": of_memory}
    rectangle |= {"features": rows, "labels": labels}
    yield pytest.param(rectangle, 12, id="rectangle")
    both = {**rectangle, "symmetric": True}
    yield pytest.param(both, 32, id="both directions")
    wide = {name: torch.randn(len(x), 264) for name, x in both.items() if name.endswith("features")}
    yield pytest.param({**both, **wide}, 40, id="both directions of wide rows")
    soft = F.one_hot(labels).float()
    yield pytest.param({"features": rows, "labels": soft}, 100, id="soft labels")
    yield pytest.param({**labelled, "many": True}, 20, id="many rows")
    yield pytest.param({**rectangle, "many": True}, 20, id="many rows and columns")


@pytest.mark.parametrize("arguments, most", list(launch_cases()))
def test_a_step_has_few_launches(arguments, most, monkeypatch):
    run = triton_run.run

    def recorded(launch, device, given):
        with torch.profiler.record_function(f"launch {launch.kernel}"):
            run(launch, device, given)

    arguments = dict(arguments)
    if arguments.pop("many", False):
        monkeypatch.setattr(triton_launch, "SORTED_PAIRS", 0)
    monkeypatch.setattr(triton_run, "run", recorded)
    monkeypatch.setattr(triton_call, "_temperature", on_the_device)
    monkeypatch.setattr(validation, "_readable", lambda x: False)
    leaves = {
        name: x.clone().requires_grad_()
        for name, x in arguments.items()
        if isinstance(x, torch.Tensor) and x.is_floating_point() and name != "labels"
    }

    def step():
        torch.autograd.grad(triton_loss(**{**arguments, **leaves}), list(leaves.values()))

    found = launches_of(step)
    assert 5 < len(found) <= most, found
    assert WAITS.isdisjoint(found)


def on_the_device(problem: Problem) -> torch.Tensor | float:
    """The temperature as on CUDA, where a tensor is not read by the host."""
    tau = problem.temperature_tensor
    return problem.temperature if tau is None else tau.float()


# --- products of TF32


@pytest.mark.parametrize("precision, is_allowed", [("highest", False), ("high", True)])
def test_torch_is_asked_whether_tf32_will_do(precision, is_allowed):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert loss_module._allows_tf32() == is_allowed
    finally:
        torch.set_float32_matmul_precision(before)


def as_tf32(x: torch.Tensor) -> torch.Tensor:
    """What the tensor cores see of it."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def test_with_tf32_the_loss_is_of_the_rows_that_are_multiplied():
    # Pairs that have nearly converged: what the positives have of the rows' other bits is no loss.
    g = torch.Generator().manual_seed(0)
    features = torch.randn(60, 48, generator=g)
    features = torch.cat([features, features + 0.1 * torch.randn(60, 48, generator=g)])
    problem = problem_of(features, torch.arange(60).repeat(2))
    problem = dataclasses.replace(problem, temperature=0.05, tf32=True)
    found = op.results_of(problem, "triton", "none")
    rows = found.prepared[: 128 * 64].view(128, 64)
    assert torch.equal(rows, as_tf32(rows))
    logits = (rows.double() @ rows.double().T)[:120, :120] * math.log(2)
    logits.fill_diagonal_(-math.inf)
    positive = (torch.arange(120) + 60) % 120
    exact = F.cross_entropy(logits, positive, reduction="none")
    assert exact.max() < 1e-3
    torch.testing.assert_close(found.loss.double(), exact, rtol=1e-4, atol=1e-5)


# --- float16 at many rows


@pytest.mark.parametrize("headroom, kept", [(triton_call.HEADROOM, True), (2.0**-10, False)])
def test_float16_keeps_the_probabilities_of_many_rows(headroom, kept, monkeypatch):
    """64 rows as if of 32,768, with probabilities of 2^-15.

    Without room above float16's subnormals, or with the factor 1/N of a mean among the
    probabilities, most of them would be flushed to zero, which this test must see.
    """
    monkeypatch.setattr(triton_call, "HEADROOM", headroom)
    g = torch.Generator().manual_seed(0)
    features, many = torch.randn(64, 32, generator=g).half(), 32768
    results = []
    for dtype in (torch.float16, torch.float32):
        problem = problem_of(features.to(dtype), torch.arange(64) // 2)
        found = op.results_of(problem, "triton", "none")
        found.stats[0] *= many / 64
        found.stats[1] = 1e30  # as many positives: their pull does not hide the softmax part
        upstream = torch.full_like(
            found.loss, 1024.0
        )  # a loss scale: the result is float16 as well
        anchors = Anchors(upstream, found.divisor, found.stats, found.prepared)
        grads = op.gradients_of(problem, anchors, None, Wanted(rows=True), "triton")
        results.append(grads.rows.float())
    error = (results[0] - results[1]).abs().max() / results[1].abs().max()
    assert (error < 4 * torch.finfo(torch.float16).eps) == kept


def problem_of(features: torch.Tensor, labels: torch.Tensor) -> Problem:
    """A square call."""
    return Problem(
        rows=features,
        cols=None,
        row_labels=labels,
        col_labels=None,
        weights=None,
        temperature_tensor=None,
        self_offset=0,
        temperature=0.5,
        summation="out",
        denominator="all",
        normalize=True,
        ignore_index=-100,
    )


# --- what it takes


def test_what_it_leaves_to_others():
    features, soft, mask = torch.randn(4, 3), torch.rand(4, 2), torch.ones(4, 4)
    with pytest.raises(ValueError, match="it takes labels or none"):
        triton_loss(features, mask=mask)
    with pytest.raises(ValueError, match="soft labels with summation='out' and denominator='all'"):
        triton_loss(features, soft, summation="in")
    with pytest.raises(ValueError, match="float32, float16 and bfloat16"):
        triton_loss(features.double(), torch.arange(4))
    with pytest.raises(ValueError, match="up to 8192 features"):
        triton_loss(torch.randn(4, 8193), torch.arange(4))
    with pytest.raises(ValueError, match="up to 2\\^40 pairs"):
        many = torch.zeros(1, 1).expand(2**20 + 1, 1)
        triton_loss(many, torch.zeros(1, dtype=torch.int64).expand(2**20 + 1))
