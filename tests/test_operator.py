"""The operator among PyTorch's machinery: registration, compilation, autocast, layouts, choice of backend."""

from __future__ import annotations

import functools
import importlib.metadata
import subprocess
import sys
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import supcon_kernels
from cases import BACKENDS, FUSED, VARIANTS, by_id, takes
from supcon_kernels import available_backends, backends, op, supcon_loss, validation
from supcon_kernels.backends import native, tiled
from supcon_kernels.backends.protocol import Anchors, Wanted
from supcon_kernels.problem import Problem

fused = pytest.mark.parametrize("backend", FUSED)


def problem_of(name: str, dtype: torch.dtype = torch.float32, **options) -> Problem:
    """The problem that ``supcon_loss`` builds of a case."""
    built = []

    def stop(problem, backend):
        built.append(problem)
        raise InterruptedError

    arguments = by_id(name).arguments()
    arguments["features"] = arguments["features"].to(dtype)
    if "contrast_features" in arguments:
        arguments["contrast_features"] = arguments["contrast_features"].to(dtype)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(backends, "choose", stop)
        supcon_loss(**{**arguments, **options})
    return built[0]


def require_grad(problem: Problem) -> tuple[object, ...]:
    """The operands, with gradients wanted of everything that can have one."""
    tensors = {
        name: x.detach().clone().requires_grad_()
        for name in ("rows", "cols", "temperature_tensor")
        if (x := getattr(problem, name)) is not None
    }
    return tuple(tensors.get(name, x) for name, x in vars(problem).items())


def variant_of(name: str, variant: tuple[str, str]) -> dict:
    return by_id(name).arguments() | dict(zip(("summation", "denominator"), variant))


OPCHECK_CASES = [
    "ragged",
    "self_in_memory",
    "weighted_mask",
    "soft_memory",
    "half_empty_memory",
    "symmetric_memory",
    "symmetric_mask",
]


@pytest.mark.parametrize(
    "backend, name, variant",
    [
        (backend, name, variant)
        for backend in FUSED
        for name in OPCHECK_CASES
        for variant in [("out", "all"), ("in", "one_positive")]
        if takes(backend, variant_of(name, variant))
    ],
)
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # opcheck's own doing
def test_opcheck(backend, name, variant):
    options = {"summation": variant[0], "denominator": variant[1]}
    if name in ("ragged", "self_in_memory"):
        options["temperature"] = torch.tensor(0.1)
    problem = problem_of(name, **options)
    reduction = "mean" if problem.symmetric else "none"
    operands = (*require_grad(problem), backend, reduction)
    torch.library.opcheck(op.forward, operands)
    loss, *saved = op.forward(*problem.operands(), backend, reduction)
    needs = (True, problem.cols is not None, problem.temperature_tensor is not None)
    fixed = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in operands)
    torch.library.opcheck(
        op.backward,
        (torch.ones_like(loss), *saved, *needs, *fixed[:-1]),
        test_utils=("test_schema", "test_faketensor"),
    )


@fused
def test_every_reduction_is_of_the_anchors_losses(backend):
    problem = problem_of("singleton")  # one anchor without positives
    features, *others = require_grad(problem)
    losses, *_ = op.forward(features, *others, backend, "none")
    expected = {
        "mean": losses.mean(),
        "positive_mean": losses.sum() / (len(losses) - 1),
        "sum": losses.sum(),
    }
    for reduction, want in expected.items():
        loss, *_ = op.forward(features, *others, backend, reduction)
        torch.testing.assert_close(loss, want)
        gradients = [torch.autograd.grad(x, features, retain_graph=True) for x in (loss, want)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "backend, name, variant",
    [
        (backend, name, variant)
        for backend in FUSED
        for name in ("memory", "half_empty_memory", "soft_memory")
        for variant in VARIANTS
        if takes(backend, variant_of(name, variant))
    ],
)
def test_columns_that_are_anchors_too(backend, name, variant):
    temperature = torch.tensor(0.1, dtype=torch.float64)
    arguments = {**variant_of(name, variant), "temperature": temperature}
    problem = problem_of(name, torch.float64, **arguments)
    rows, cols = problem.operands(), problem.mirrored().operands()
    loss, one, stats, _ = op.forward(*rows, backend, "none")
    col_loss, _, col_stats, _ = op.forward(*cols, backend, "none")
    weights = torch.linspace(0.5, 1.5, len(loss) + len(col_loss), dtype=torch.float64)
    weight, col_weight = weights.split((len(loss), len(col_loss)))
    rows, cols = (*rows, backend), (*cols, backend)
    by_rows = op.backward(weight, one, stats, None, True, False, True, *rows)
    by_cols = op.backward(col_weight, one, col_stats, None, False, True, True, *cols)
    call = (weight, one, stats, None, True, False, True, *rows, col_weight, col_stats)
    together = op.backward(*call)
    torch.testing.assert_close(together[0], by_rows[0] + by_cols[1])
    torch.testing.assert_close(together[2], (by_rows[2] + by_cols[2]) / 2)
    torch.library.opcheck(op.backward, call, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_training_step_with_dynamic_batch(backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    encoder = torch.nn.Linear(12, 8)

    def step(x, labels, temperature):
        return supcon_loss(encoder(x), labels, temperature=temperature, backend=backend)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (16, 23, 40):
        x, labels = torch.randn(n, 2, 12), torch.randint(0, 4, (n,))
        results = []
        for run in (step, compiled):
            temperature = torch.tensor(0.1, requires_grad=True)
            loss = run(x, labels, temperature)
            grads = torch.autograd.grad(loss, [*encoder.parameters(), temperature])
            results.append((loss, *grads))
        for eager, traced in zip(*results):
            torch.testing.assert_close(eager, traced)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_step_with_a_memory_and_soft_labels():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def step(x, labels, memory, names):
        return supcon_loss(
            x,
            labels,
            contrast_features=torch.cat((memory, x)),
            contrast_labels=torch.cat((names, labels)),
            self_offset=memory.shape[0],
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, m in ((6, 9), (11, 14), (8, 30)):
        call = (torch.randn(n, 4), torch.rand(n, 3), torch.randn(m, 4), torch.rand(m, 3))
        torch.testing.assert_close(compiled(*call), step(*call))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@fused
def test_inductor_compiles_a_training_step(backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    encoder = torch.nn.Linear(12, 8)
    x, labels = torch.randn(30, 12), torch.randint(0, 4, (30,))

    @torch.compile(fullgraph=True)
    def loss_of(x):
        return supcon_loss(encoder(x), labels, temperature=0.1, backend=backend)

    loss = loss_of(x)
    compiled = torch.autograd.grad(loss, encoder.weight)[0]
    expected = supcon_loss(encoder(x), labels, temperature=0.1, backend=backend)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(compiled, torch.autograd.grad(expected, encoder.weight)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", [("out", "all"), ("in", "one_positive")], ids="/".join)
def test_autocast_changes_nothing(backend, variant):
    arguments = by_id("two_views").arguments()
    features = arguments.pop("features").float().requires_grad_()
    options = {"summation": variant[0], "denominator": variant[1]}
    if not takes(backend, {"features": features, **arguments, **options}):
        return
    options["backend"] = backend
    expected = supcon_loss(features, **arguments, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = supcon_loss(features, **arguments, **options)
        if backend != "reference":  # a dense graph's backward belongs outside, as PyTorch says
            (grad,) = torch.autograd.grad(loss, features)
            assert torch.equal(grad, torch.autograd.grad(expected, features)[0])
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dtypes_of_results(backend, dtype):
    features = torch.randn(8, 4, dtype=dtype, requires_grad=True)
    temperature = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(8) % 2
    loss = supcon_loss(features, labels, temperature=temperature, backend=backend)
    loss.backward()
    assert (loss.dtype, features.grad.dtype) == (torch.float32, dtype)
    assert temperature.grad.dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    torch.manual_seed(0)
    labels = torch.arange(12) % 3
    layouts = {
        "transposed": torch.randn(5, 12).T,
        "sliced": torch.randn(24, 9)[::2, 1:6],
        "expanded": torch.randn(4, 1, 5).expand(4, 3, 5).flatten(0, 1),
        "expanded_row": torch.randn(1, 5).expand(12, 5),
        "offset": torch.randn(61)[1:].view(12, 5),
    }
    for x in layouts.values():
        leaf = x.detach().requires_grad_()
        packed = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        loss = supcon_loss(leaf, labels, backend=backend)
        expected = supcon_loss(packed, labels, backend=backend)
        assert torch.equal(loss, expected)
        # An expanded gradient, as the reduction hands it to the operator.
        got, want = torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(expected, packed)[0]
        assert torch.equal(got, want)


@fused
@pytest.mark.parametrize("variant", VARIANTS, ids="/".join)
def test_differentiating_twice_names_the_backend_that_can(backend, variant):
    features, labels = torch.randn(8, 4, requires_grad=True), torch.arange(8) % 2
    options = {"summation": variant[0], "denominator": variant[1]}
    if not takes(backend, {"features": features, "labels": labels, **options}):
        return
    loss = supcon_loss(features, labels, **options, backend=backend)
    (grad,) = torch.autograd.grad(loss, features, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.sum().backward()


@fused
@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")  # torch.func's own doing
def test_forward_mode_and_torch_func_fall_back_to_the_backend_that_can(backend):
    features, labels = torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 2
    direction = torch.randn_like(features)
    grad = torch.func.grad(lambda x: supcon_loss(x, labels))(features)
    _, tangent = torch.func.jvp(lambda x: supcon_loss(x, labels), (features,), (direction,))
    torch.testing.assert_close(tangent, (grad * direction).sum())
    scale = torch.tensor(2.0, dtype=torch.float64)
    value = torch.func.grad(lambda s: s * supcon_loss(features, labels))(scale)
    torch.testing.assert_close(value, supcon_loss(features, labels))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(features, direction)
        tangent = torch.autograd.forward_ad.unpack_dual(supcon_loss(dual, labels)).tangent
        torch.testing.assert_close(tangent, (grad * direction).sum())
        with pytest.raises(ValueError, match="forward-mode"):
            supcon_loss(dual, labels, backend=backend)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")  # torch.func's own doing
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_func_is_the_same_when_compiled():
    torch._dynamo.reset()
    features, labels = torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 2
    direction = torch.randn_like(features)

    def derivatives(x):
        loss = functools.partial(supcon_loss, labels=labels)
        return torch.func.grad(loss)(x), torch.func.jvp(loss, (x,), (direction,))

    compiled = torch.compile(derivatives, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(features), derivatives(features))


def test_the_choice_can_be_traced_beside_a_gpu(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("called in a trace"))
    monkeypatch.setattr(importlib.metadata, "version", lambda _: pytest.fail("called in a trace"))
    monkeypatch.setattr(native, "core", None)  # so that all are asked
    x, mask = torch.randn(4, 3), torch.ones(4, 4)

    def loss(x):
        return supcon_loss(x, mask=mask)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), loss(x))


def test_targets_that_no_host_looks_at_make_the_loss_nan():
    x = torch.randn(4, 3, requires_grad=True)
    soft, mask = torch.rand(4, 2), torch.ones(4, 4)
    targets = [{"labels": soft - 1}, {"labels": soft / 0}, {"mask": mask / 0}]
    for backend in ("native", "tiled", "reference"):
        for call in targets:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(validation, "_readable", lambda x: False)  # as on a GPU
                loss = supcon_loss(x, **call, backend=backend)
            assert loss.isnan()
            assert torch.autograd.grad(loss, x)[0].isnan().all() or backend == "reference"


def test_values_are_read_on_the_cpu_alone():
    assert validation._readable(torch.zeros(()))
    for device in ("cuda:0", "mps"):
        assert not validation._readable(types.SimpleNamespace(device=torch.device(device)))


class NothingWaits(TorchDispatchMode):
    """Refuses what would make the host wait for a device, and what no CUDA graph can hold."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "bincount")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._opname not in self.WAITS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", VARIANTS, ids="/".join)
def test_the_tiled_backend_waits_for_no_device(variant):
    for name in ("ragged", "self_in_memory", "half_empty_memory", "soft_memory", "weighted_mask"):
        problem = problem_of(name, **variant_of(name, variant))
        wanted = Wanted(True, problem.cols is not None, True)
        with NothingWaits():
            loss, divisor, stats, _ = tiled.forward(problem, "mean")
            tiled.backward(problem, Anchors(torch.ones_like(loss), divisor, stats), None, wanted)


class Operators(TorchDispatchMode):
    """Writes down which of the operators are called."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "supcon_kernels":
            self.called.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_modes_see_both_operators_and_profilers_the_call():
    features, labels = torch.randn(8, 4, requires_grad=True), torch.arange(8) % 2
    with Operators() as operators:
        supcon_loss(features, labels).backward()
    assert operators.called == ["forward", "backward"]
    expected, features.grad = features.grad, None
    with torch.profiler.profile() as profile:
        supcon_loss(features, labels).backward()
    names = [event.name for event in profile.events()]
    assert names.count("SupConLossWithGradients") == 1
    assert not any(name.startswith("supcon_kernels::") for name in names)  # nor a dispatcher's pass
    torch.testing.assert_close(features.grad, expected)
    with torch.profiler.profile() as profile:
        supcon_loss(features.detach(), labels)
    assert [event.name for event in profile.events()].count("supcon_kernels::forward") == 1


def test_shapes_alone_suffice():
    with torch._subclasses.FakeTensorMode():
        features, labels = torch.randn(6, 3), torch.rand(6, 2)
        assert supcon_loss(features, labels, temperature=torch.tensor(0.1)).shape == ()


def test_no_grad_needs_no_backward():
    loss = supcon_loss(torch.randn(8, 4), torch.arange(8) % 2)
    assert not loss.requires_grad


def test_memory_grows_with_n_not_with_its_square():
    peaks = {n: peak_bytes(n) for n in (2048, 8192)}
    dense = 8192 * 8192 * 4
    assert peaks[8192] < dense / 4
    assert peaks[8192] < 4.5 * peaks[2048]


def peak_bytes(n: int) -> int:
    """Most bytes that tensors made by the tiled backend hold at once, forward and backward."""
    arguments = (torch.randn(n, 32, requires_grad=True), torch.arange(n) % 10)
    with torch.profiler.profile(profile_memory=True) as profile:
        supcon_loss(*arguments, backend="tiled").backward()
    held = peak = 0
    for event in sorted(memory_events(profile), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert peak > 0
    return peak


def memory_events(profile):
    """The allocations and frees that a profile recorded."""
    return [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]


# --- the choice of a backend


def stand_in(unavailable=None, why_not=None):
    """A backend that answers as told."""
    reason = unavailable or why_not
    return types.SimpleNamespace(unavailable=lambda: unavailable, why_not=lambda problem: reason)


def test_the_first_backend_without_a_reason_takes_the_call(monkeypatch):
    table = {
        "absent": stand_in(unavailable="it needs a quantum computer."),
        "picky": stand_in(why_not="it wants an even number of rows."),
        "able": stand_in(),
        "late": stand_in(),
    }
    monkeypatch.setattr(backends, "BACKENDS", table)
    problem = problem_of("ragged")
    assert backends.choose(problem, None) == "able"
    assert backends.choose(problem, "late") == "late"
    for name, reason in (("absent", "quantum computer"), ("picky", "even number")):
        with pytest.raises(ValueError, match=f"backend '{name}' cannot take this call: .*{reason}"):
            backends.choose(problem, name)
    assert backends.available_backends() == {
        "absent": "it needs a quantum computer.",
        "picky": None,
        "able": None,
        "late": None,
    }


def test_the_default_is_the_first_in_the_list():
    assert backends.choose(problem_of("ragged"), None) == FUSED[0]


def test_python_dash_m_reports_every_backend():
    command = [sys.executable, "-m", "supcon_kernels"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert supcon_kernels.__version__ in out
    assert torch.__version__ in out
    for name in available_backends():
        assert f"{name} " in out
    assert "ready" in out


@pytest.mark.parametrize("backend", ["native", "tiled"])
def test_activation_checkpointing_gives_the_same_gradient(backend):
    features = torch.randn(16, 8, requires_grad=True)
    labels = torch.arange(16) % 4

    def loss(x):
        return supcon_loss(x, labels, backend=backend)

    (expected,) = torch.autograd.grad(loss(features), features)
    checkpointed = checkpoint(loss, features, use_reentrant=False)
    (found,) = torch.autograd.grad(checkpointed, features)
    assert torch.equal(found, expected)
