"""The compiled core: every instruction set of this CPU, any number of threads, any input."""

from __future__ import annotations

import functools
import multiprocessing
import os
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from cases import CASES, VARIANTS, Case, by_id, takes
from compare import assert_close
from supcon_kernels import available_backends, supcon_loss
from supcon_kernels.backends import native

WHY_NOT = available_backends()["native"]
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
native_loss = functools.partial(supcon_loss, backend="native")
ISAS = native.core.isa_names() if WHY_NOT is None else []


def arguments_of(case: Case, variant: tuple[str, str]) -> dict:
    return {**case.arguments(), "summation": variant[0], "denominator": variant[1]}


def value_and_gradients(arguments):
    """The loss and the gradients, as bits may be compared."""
    leaves = {k: v.clone() for k, v in arguments.items() if k.endswith("features")}
    for leaf in leaves.values():
        leaf.requires_grad_()
    temperature = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    loss = native_loss(**{**arguments, **leaves, "temperature": temperature})
    return [loss.detach(), *torch.autograd.grad(loss, [*leaves.values(), temperature])]


def dtypes_of(isa):
    """What an instruction set multiplies with functions of its own."""
    return [torch.bfloat16] if isa == "avx512_bf16" else [torch.float32, torch.float64]


@pytest.mark.parametrize(
    "isa, dtype", [(isa, dtype) for isa in ISAS for dtype in dtypes_of(isa)], ids=str
)
def test_every_instruction_set(isa, dtype, monkeypatch):
    monkeypatch.setattr(native, "isa", isa)
    for k, case in enumerate(CASES):
        arguments = arguments_of(case, VARIANTS[k % len(VARIANTS)])
        if takes("native", arguments):
            assert_close(native_loss, arguments, dtype)
            assert_close(native_loss, case.arguments(), dtype)


@pytest.mark.parametrize("isa", ISAS)
def test_bfloat16_is_multiplied_or_widened_as_the_report_says(isa, monkeypatch):
    # Widened, its results have the bits of float32 features of the same values.
    monkeypatch.setattr(native, "isa", isa)
    features = by_id("several_tiles").arguments()["features"].bfloat16()
    labels = by_id("several_tiles").arguments()["labels"]
    narrow, wide = (
        value_and_gradients({"features": x, "labels": labels}) for x in (features, features.float())
    )
    multiplied = native.core.multiplies_bfloat16(isa)
    assert multiplied == (isa == "avx512_bf16")
    assert ("in 16 bits" in native.description()) == multiplied
    assert torch.equal(narrow[1], wide[1].bfloat16()) != multiplied
    torch.testing.assert_close(narrow[0], wide[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("isa", ISAS)
def test_bfloat16_rows_of_any_size(isa, monkeypatch):
    # Their products over- and underflow in 16 bits unless each row is brought near 1.
    monkeypatch.setattr(native, "isa", isa)
    arguments = by_id("several_tiles").arguments()
    sizes = torch.logspace(-38, 37, len(arguments["features"]), dtype=torch.float64)
    arguments["features"] = arguments["features"] * sizes[:, None]
    assert_close(native_loss, arguments, torch.bfloat16)


@pytest.mark.parametrize("isa", ISAS)
def test_the_bfloat16_gradient_of_classes_that_have_nearly_converged(isa, monkeypatch):
    # Softmax and attraction nearly cancel: rounded apart, their roundings are most of the gradient.
    monkeypatch.setattr(native, "isa", isa)
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(6, (600,), generator=g)
    centres = 3 * torch.randn(6, 64, generator=g)
    features = centres[labels] + 0.05 * torch.randn(600, 64, generator=g)
    leaf = features.bfloat16().requires_grad_()
    exact = leaf.detach().double().requires_grad_()
    options = {"labels": labels, "temperature": 0.05}
    found = torch.autograd.grad(native_loss(leaf, **options), leaf)[0].double()
    truth = torch.autograd.grad(supcon_loss(exact, **options, backend="reference"), exact)[0]
    assert (found - truth).abs().max() < 0.05 * truth.abs().max()


def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(native, "isa", "avx1024")
    with pytest.raises(ValueError, match="avx1024"):
        native_loss(torch.randn(4, 3), torch.tensor([0, 0, 1, 1]))


@pytest.mark.parametrize("variant", VARIANTS, ids="/".join)
@pytest.mark.parametrize("name", ["singleton", "self_in_memory"])
def test_derivatives(name, variant):
    arguments = arguments_of(by_id(name), variant)
    features = arguments.pop("features").requires_grad_()
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    del arguments["temperature"]

    def loss(features, temperature):
        options = {"temperature": temperature, "reduction": "none"}
        return native_loss(features, **arguments, **options)

    assert gradcheck(loss, (features, temperature))


def test_without_the_core_the_next_backend_takes_over(monkeypatch):
    arguments = by_id("two_views").arguments()
    expected = supcon_loss(**arguments, backend="tiled")
    monkeypatch.setattr(native.core, "__version__", "0.0.0")
    assert "of version 0.0.0" in available_backends()["native"]
    monkeypatch.undo()
    monkeypatch.setattr(native.core, "interface", 0)
    assert "(interface 0)" in available_backends()["native"]
    monkeypatch.setattr(native, "core", None)
    assert "C++17 compiler" in available_backends()["native"]
    assert torch.equal(supcon_loss(**arguments), expected)


def test_another_default_device_changes_nothing():
    for labels in (torch.arange(6) % 2, torch.rand(6, 3)):
        features = torch.randn(6, 4, requires_grad=True)
        expected = torch.autograd.grad(supcon_loss(features, labels), features)
        with torch.device("meta"):
            found = torch.autograd.grad(supcon_loss(features, labels), features)
        assert torch.equal(found[0], expected[0])


MASK_DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
MASK_DTYPES += [torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=str)
def test_a_mask_is_read_where_it_is(dtype):
    g = torch.Generator().manual_seed(0)
    features = torch.randn(70, 8, generator=g)
    values = torch.randint(2 if dtype == torch.bool else 4, (70, 70), generator=g).to(dtype)
    if dtype.is_floating_point:
        values -= 1
        values[0, 1] = values[1, 0] = torch.finfo(dtype).smallest_normal / 4
    expected = supcon_loss(features, mask=values, backend="reference", reduction="none")
    for mask in (values, values.T.contiguous().T, values.repeat(2, 2)[:70, ::2].expand(70, 70)):
        other = supcon_loss(features, mask=mask, backend="reference", reduction="none")
        torch.testing.assert_close(native_loss(features, mask=mask, reduction="none"), other)
    torch.testing.assert_close(native_loss(features, mask=values, reduction="none"), expected)


def test_what_a_long_row_adds_to_its_own_sum_comes_off_again():
    arguments = by_id("outlier").arguments() | {"reduction": "none"}
    arguments["labels"] = 0.7 * torch.nn.functional.one_hot(arguments["labels"]) + 0.1
    exact = supcon_loss(**arguments, backend="reference")
    loss = native_loss(**arguments | {"features": arguments["features"].float()})
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_row_whose_square_overflows_has_no_loss_unless_normalised():
    features = torch.tensor([[1.0, 2.0], [3.0, 1.0], [0.5, 1.5], [3e19, -2e19]])
    labels = torch.tensor([0, 0, 1, 1])
    assert native_loss(features, labels, normalize=False).isnan()


@pytest.mark.parametrize("denominator", ["all", "one_positive", "only_negatives"])
def test_exponents_beyond_the_range_of_numbers_are_not_ignored(denominator):
    features, labels = torch.randn(40, 16), torch.arange(40) % 2
    assert native_loss(features, labels, temperature=1e-40, denominator=denominator).isnan()
    expected = supcon_loss(features, labels, backend="reference")
    torch.testing.assert_close(native_loss(features, labels), expected)


@pytest.mark.parametrize("dtype, tiny", [(torch.float32, 1e-41), (torch.float64, 1e-310)])
def test_a_denormal_row_that_does_not_contribute_has_no_gradient(dtype, tiny):
    features = torch.tensor([[tiny, 0.0], [1.0, 2.0], [2.0, 1.0]], dtype=dtype).requires_grad_()
    memory, names = torch.eye(2, dtype=dtype), torch.tensor([0, 0])
    loss = native_loss(
        features, torch.tensor([9, 0, 0]), contrast_features=memory, contrast_labels=names
    )
    gradient = torch.autograd.grad(loss, features)[0]
    assert gradient[0].eq(0).all() and gradient[1:].isfinite().all() and gradient.any()


def test_ties_of_large_similarities_leave_no_logarithm_of_zero():
    # Shift and tile must round alike: here a unit in the last place is more than all of 2^x's range.
    g = torch.Generator().manual_seed(0)
    n = 150
    anchors = torch.rand(n, 1, generator=g) * 1e4
    memory = torch.cat([-torch.rand(n, 1, generator=g) * 1e4, torch.full((8, 1), 7e3)])
    names = torch.cat([torch.arange(n), torch.full((8,), -5)])
    options = {"summation": "in", "denominator": "one_positive", "normalize": False}
    arguments = {"contrast_features": memory, "contrast_labels": names, **options}
    losses = [
        supcon_loss(anchors, torch.arange(n), **arguments, reduction="none", backend=backend)
        for backend in ("native", "reference")
    ]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("temperature", [0.01, 0.03, 0.07])
def test_a_positive_that_is_all_of_the_softmax(temperature):
    # The loss is the difference of two equal numbers: rounded alike, nothing is left of them.
    g = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(256, 128, generator=g))
    features = torch.cat([features, features + 0.003 * torch.randn(256, 128, generator=g)])
    labels = torch.arange(256).repeat(2)
    arguments = {"labels": labels, "temperature": temperature, "reduction": "none"}
    loss = native_loss(features, **arguments)
    exact = supcon_loss(features.double(), **arguments, backend="reference")
    assert loss.min() >= 0
    assert (loss - exact).abs().max() < 5e-7


def test_the_gradient_of_pairs_that_have_nearly_converged():
    # Softmax and attraction nearly cancel: added to the gradient apart, both leave their roundings.
    g = torch.Generator().manual_seed(0)
    features = torch.randn(512, 128, generator=g)
    features = torch.cat([features, features + 0.7 * torch.randn(512, 128, generator=g)])
    labels = torch.arange(512).repeat(2)

    def gradient(dtype, backend):
        leaf = features.to(dtype).requires_grad_()
        loss = supcon_loss(leaf, labels, temperature=0.05, backend=backend)
        return torch.autograd.grad(loss, leaf)[0].double()

    exact = gradient(torch.float64, "reference")
    error, dense = (
        (gradient(torch.float32, backend) - exact).abs().max()
        for backend in ("native", "reference")
    )
    assert error < 1.5 * dense


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**95])
def test_gradients_of_any_magnitude(scale):
    # At this temperature 2^x spans float32's range, and weights divided by its sums have none to spare.
    g = torch.Generator().manual_seed(0)
    features = 1 + 0.1 * torch.randn(64, 16, generator=g)
    labels = torch.arange(64) % 7
    for options in ({}, {"contrast_features": -features, "contrast_labels": labels}):
        leaf = features.clone().requires_grad_()
        loss = native_loss(leaf, labels, temperature=0.0231, **options)
        whole = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
        scaled = torch.autograd.grad(loss, leaf, torch.tensor(scale))[0]
        assert whole.any() and torch.equal(scaled.double() / scale, whole.double())


@pytest.mark.parametrize("variant", VARIANTS, ids="/".join)
@pytest.mark.parametrize("temperature", [0.004, 0.0075, 0.02])
@pytest.mark.parametrize("far", ["none", "some", "all"])
@pytest.mark.parametrize("targets", ["labels", "mask"])
def test_one_shift_of_all_rows_is_only_tried(targets, far, temperature, variant):
    # The sums of rows that are opposite to all columns leave float32's range by the shift of others.
    g = torch.Generator().manual_seed(0)
    direction = torch.randn(16, generator=g, dtype=torch.float64)
    rows = direction + 0.1 * torch.randn(300, 16, generator=g, dtype=torch.float64)
    cols = direction + 0.1 * torch.randn(200, 16, generator=g, dtype=torch.float64)
    rows[slice({"none": 0, "some": 3, "all": 300}[far])] *= -1
    of_rows = torch.arange(300) % 6  # no column is of the last class
    of_cols = torch.arange(200) % 5
    arguments = {
        "features": rows,
        "contrast_features": cols,
        "labels": of_rows,
        "contrast_labels": of_cols,
        "temperature": temperature,
        "symmetric": True,
        **dict(zip(("summation", "denominator"), variant)),
    }
    if targets == "mask":
        del arguments["labels"], arguments["contrast_labels"]
        weights = torch.rand(300, 200, generator=g)
        arguments["mask"] = weights * (of_rows[:, None] == of_cols)
    for dtype in (torch.float32, torch.bfloat16):
        assert_close(native_loss, arguments, dtype)


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("variant", [("out", "all"), ("in", "one_positive")], ids="/".join)
@pytest.mark.parametrize("targets", ["labels", "soft labels", "mask"])
@pytest.mark.parametrize(
    "num_cols, symmetric",
    [(None, False), (800, False), (800, True)],
    ids=["square", "cols", "both"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_from_any_number_of_threads(
    dtype, num_cols, symmetric, targets, variant, threads
):
    # So many products that the core does take a second thread.
    g = torch.Generator().manual_seed(0)
    arguments = {
        "features": torch.randn(600, 32, generator=g).to(dtype),
        "labels": torch.randint(7, (600,), generator=g),
        "summation": variant[0],
        "denominator": variant[1],
    }
    if targets == "soft labels":
        arguments["labels"] = torch.randn(600, 300, generator=g).mul(3).softmax(1)
    if targets == "mask":
        arguments["mask"] = torch.rand(600, num_cols or 600, generator=g) < 0.1
        del arguments["labels"]
    if num_cols is not None and targets == "mask":
        arguments["contrast_features"] = torch.randn(num_cols, 32, generator=g).to(dtype)
    elif num_cols is not None:
        names = torch.randint(7, (num_cols,), generator=g)
        if targets == "soft labels":
            names = torch.rand(num_cols, 300, generator=g)
        names[100:700] = arguments["labels"]
        arguments["contrast_features"] = torch.randn(num_cols, 32, generator=g).to(dtype)
        arguments |= {"contrast_labels": names, "self_offset": None if symmetric else 100}
    arguments["symmetric"] = symmetric
    results = []
    for count in (1, 2, 3, 1):
        threads(count)
        results.append(value_and_gradients(arguments))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("num_cols", [None, 5000])
def test_tiles_in_groups(num_cols, threads):
    # Long sides are worked on in groups of tiles, short ones (here 200 rows) are not.
    g = torch.Generator().manual_seed(0)
    n = 5000 if num_cols is None else 200
    arguments = {
        "features": torch.randn(n, 3, generator=g),
        "labels": torch.randint(7, (n,), generator=g),
    }
    if num_cols is not None:
        arguments["contrast_features"] = torch.randn(num_cols, 3, generator=g)
        arguments["contrast_labels"] = torch.randint(7, (num_cols,), generator=g)
    results = []
    for count in (1, 3):
        threads(count)
        results.append(value_and_gradients(arguments))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    exact = {k: v.double() if v.is_floating_point() else v for k, v in arguments.items()}
    leaf = exact["features"].requires_grad_()
    expected = supcon_loss(**exact, temperature=0.1, backend="tiled")
    torch.testing.assert_close(results[0][0].double(), expected.detach(), rtol=1e-6, atol=0)
    gradient = torch.autograd.grad(expected, leaf)[0]
    torch.testing.assert_close(results[0][1].double(), gradient, rtol=1e-3, atol=1e-7)


def test_calls_from_several_threads_at_once(threads):
    threads(2)
    arguments = by_id("several_tiles").arguments()
    expected = value_and_gradients(arguments)
    results = [None] * 6

    def call(k):
        results[k] = value_and_gradients(arguments)

    callers = [threading.Thread(target=call, args=(k,)) for k in range(len(results))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, expected))


def loss_in_child(queue):
    """What a forked worker computes, where the parent's pool of threads does not exist."""
    torch.manual_seed(0)
    queue.put(float(native_loss(torch.randn(1200, 8), torch.arange(1200) % 5)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_does_not_hang(threads):
    threads(2)
    torch.manual_seed(0)
    expected = float(native_loss(torch.randn(1200, 8), torch.arange(1200) % 5))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=loss_in_child, args=(queue,))
    child.start()
    got = queue.get(timeout=60)
    child.join(timeout=60)
    assert child.exitcode == 0
    assert got == expected


IN_A_SUBINTERPRETER = """
try:
    import _interpreters as interpreters
except ImportError:  # before Python 3.13
    import _xxsubinterpreters as interpreters
interpreters.run_string(interpreters.create(), '''
import sys
sys.path[:0] = {path}
try:
    import _supcon_kernels
except ImportError as error:
    print(error, flush=True)
''')
"""


def test_a_subinterpreter_is_refused():
    script = IN_A_SUBINTERPRETER.format(path=sys.path)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "subinterpreter" in done.stdout, done.stderr


@st.composite
def calls(draw):
    """Arguments of every kind that the core takes, and some that nobody does."""
    n, dim = draw(st.integers(0, 70)), draw(st.integers(0, 40))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    temperature = draw(st.sampled_from([0.01, 0.05, 0.5, 10.0, -1.0]))
    normalize = draw(st.booleans())
    # Rows that are taken as they are given have similarities as large as unit rows have.
    size = 1.0 if normalize else max(dim, 1) ** -0.5
    wide = size * torch.randn(2 * n + 1, 2 * dim + 1, generator=g, dtype=torch.float64)
    wide = wide.to(dtype)
    rows = {
        "packed": wide[:n, :dim].contiguous(),
        "strided": wide[1 : 2 * n + 1 : 2, 1 : 2 * dim + 1 : 2],
        "transposed": wide[:n, :dim].T.contiguous().T,
        "expanded": wide[:1, :dim].expand(n, dim),
    }
    features = rows[draw(st.sampled_from(sorted(rows)))]
    num_classes = draw(st.sampled_from([1, 2, 5, 1000]))
    arguments = {
        "features": features,
        "labels": torch.randint(
            num_classes, (n + draw(st.sampled_from([0, 0, 0, 1])),), generator=g
        ),
        "temperature": temperature,
        "summation": draw(st.sampled_from(["out", "in"])),
        "denominator": draw(st.sampled_from(["all", "one_positive", "only_negatives"])),
        "normalize": normalize,
        "reduction": draw(st.sampled_from(["mean", "positive_mean", "sum", "none"])),
        "ignore_index": draw(st.sampled_from([-100, 0])),
    }
    if draw(st.booleans()):
        m = draw(st.integers(0, 90))
        contrast = torch.randn(m, dim, generator=g, dtype=torch.float64).to(dtype)
        names = torch.randint(num_classes, (m,), generator=g)
        arguments |= {"contrast_features": contrast, "contrast_labels": names}
        arguments["self_offset"] = draw(st.sampled_from([None, 0, 3]))
    return arguments


@st.composite
def weighted_calls(draw):
    """The same with soft labels or a mask."""
    arguments = draw(calls()) | {"normalize": True, "reduction": "mean"}
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if draw(st.booleans()):
        for name in ("labels", "contrast_labels"):
            if name in arguments:
                arguments[name] = torch.rand(len(arguments[name]), 3, generator=g)
        return arguments
    arguments = {k: x for k, x in arguments.items() if not k.endswith("labels")}
    cols = arguments.get("contrast_features", arguments["features"])
    shape = len(arguments["features"]), len(cols)
    return arguments | {"mask": torch.randint(-1, 3, shape, generator=g)}


def assert_right_or_refused(arguments):
    dtype = arguments["features"].dtype
    try:
        native_loss(**arguments)
    except ValueError:
        with pytest.raises(ValueError):
            supcon_loss(**arguments, backend="reference")
        return
    for name in ("features", "contrast_features"):
        if name in arguments:
            arguments[name] = arguments[name].double()
    assert_close(native_loss, arguments, dtype)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(calls())
def test_any_call_is_right_or_refused(arguments):
    assert_right_or_refused(arguments)


@settings(max_examples=60, deadline=None, derandomize=True)
@given((calls() | weighted_calls()).filter(lambda arguments: "contrast_features" in arguments))
def test_any_call_of_both_ways_is_right_or_refused(arguments):
    reduction = {"none": "sum"}.get(arguments["reduction"], arguments["reduction"])
    both = {"self_offset": None, "symmetric": True, "reduction": reduction}
    assert_right_or_refused(arguments | both)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(weighted_calls())
def test_any_weights_are_right_or_refused(arguments):
    assert_right_or_refused(arguments)


def test_both_directions_are_of_one_set_of_similarities(monkeypatch):
    entered, call_of = [], native._call
    monkeypatch.setattr(
        native, "_call", lambda problem: entered.append(problem) or call_of(problem)
    )
    arguments = by_id("symmetric_tiles").arguments()
    features = arguments.pop("features").requires_grad_()
    native_loss(features, **arguments).backward()
    assert len(entered) == 2  # one forward and one backward
