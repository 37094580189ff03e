"""The loss over a process group against one process with the whole batch, and what ranks send.

The ranks are processes (tests/loss_ranks.py) that are started once and run every check. Here their
results are put together and compared.
"""

from __future__ import annotations

import math
import os
import pathlib
import subprocess
import sys
import types

import pytest
import torch
from torch._subclasses import FakeTensorMode

import calls_of_ranks
import loss_ranks
from cases import by_id
from compare import LEAVES, assert_close
from supcon_kernels import available_backends, ranks, supcon_loss

TESTS = pathlib.Path(__file__).parent
NO_TRITON = available_backends()["triton"] or ""
# As docs/scaling.md counts them.
RECORD_BYTES, SUM_BYTES, STATISTICS_BYTES, LABEL_BYTES = 56, 24, 24, 8


def run_ranks(num_ranks: int, directory: pathlib.Path, **environment: str) -> list[dict]:
    """What every rank has found."""
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                str(TESTS / "loss_ranks.py"),
                str(rank),
                str(num_ranks),
                str(directory),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    failed = [k for k, process in enumerate(processes) if process.returncode != 0]
    assert not failed, "\n".join(f"rank {k}: {said[k]}" for k in failed)
    return [
        torch.load(directory / f"rank{rank}.pt", weights_only=False) for rank in range(num_ranks)
    ]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_ranks(4, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    return run_ranks(2, tmp_path_factory.mktemp("ranks"), TRITON_INTERPRET="1")


class _Found(torch.autograd.Function):
    """A loss that was computed elsewhere, with its gradients."""

    @staticmethod
    def forward(ctx, loss, grads, *leaves):
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return None, None, *[g if g is None else g * grad for g in ctx.grads]


def whole(results: list, call: tuple):
    """The loss function that gives what the ranks found for this call, put together."""
    world, dtype = call[0], call[-1]
    shares = calls_of_ranks.shares(calls_of_ranks.arguments_of(call), world)

    def loss_function(**arguments):
        loss = results[0][0]
        leaves = {name: arguments.get(name) for name in LEAVES}
        grads = dict.fromkeys(LEAVES)
        for name, leaf in leaves.items():
            if name not in results[0][1]:
                continue
            of_ranks = [grads_of_rank[name] for _, grads_of_rank in results]
            if name == "temperature":
                grads[name] = torch.stack(of_ranks).mean(dim=0)
                continue
            grads[name] = torch.zeros_like(leaf)
            for (samples, contrasts, _), grad in zip(shares, of_ranks):
                own = samples if name == "features" else contrasts
                grads[name][own] = (grad / world).to(dtype)
        leaves = [x if isinstance(x, torch.Tensor) else None for x in leaves.values()]
        return _Found.apply(loss, list(grads.values()), *leaves)

    return loss_function


def name_of(call: tuple) -> str:
    world, name, variant, reduction, backend, dtype = call
    dtype = str(dtype).removeprefix("torch.")
    return f"{world}-{name}-{'/'.join(variant)}-{reduction}-{backend}-{dtype}"


def compare(found: list[dict], k: int, call: tuple) -> None:
    results = [of_rank["table"][k] for of_rank in found[: call[0]]]
    assert all(torch.equal(loss, results[0][0]) or loss.isnan() for loss, _ in results)
    assert_close(whole(results, call), calls_of_ranks.arguments_of(call), call[-1])


PLAN = list(enumerate(calls_of_ranks.plan()))
INTERPRETED = list(enumerate(calls_of_ranks.interpreted_plan()))


@pytest.mark.parametrize("k, call", PLAN, ids=lambda x: name_of(x) if isinstance(x, tuple) else "")
def test_ranks_have_the_loss_of_the_whole_batch(found, k, call):
    compare(found, k, call)


@pytest.mark.skipif(NO_TRITON.startswith("triton is"), reason=NO_TRITON)
@pytest.mark.parametrize(
    "k, call", INTERPRETED, ids=lambda x: name_of(x) if isinstance(x, tuple) else ""
)
def test_ranks_of_interpreted_kernels(interpreted, k, call):
    compare(interpreted, k, call)


@pytest.mark.skipif(NO_TRITON.startswith("triton is"), reason=NO_TRITON)
def test_a_memory_that_is_shared_out_is_prepared_once(interpreted):
    once = {"_forward_kernel": 1, "_loss_kernel": 1, "_weights_kernel": 1}
    queue = {**once, "_prepare_kernel": 2, "_backward_kernel": 1, "_gradient_kernel": 1}
    # The anchors of all ranks, and the contrasts whose gradient it is.
    learned = {**once, "_weights_kernel": 2, "_prepare_kernel": 4}
    learned |= {"_backward_kernel": 2, "_gradient_kernel": 2}
    for of_rank in interpreted:
        assert of_rank["launches"] == [queue, learned]


def test_averaged_parameter_gradients_are_those_of_one_process(found):
    learner = loss_ranks.Learner()
    x, labels = loss_ranks.training_data()
    features, temperature = learner(x)
    loss = supcon_loss(features, labels, temperature=temperature, backend="reference")
    expected = torch.autograd.grad(loss, list(learner.parameters()))
    for of_rank in found[:3]:
        got = of_rank["parameter_gradients"]
        torch.testing.assert_close(got, list(expected), rtol=0, atol=1e-10)


def test_what_is_sent(found):
    for of_rank in found[:3]:
        for (num_rows, dim, dtype, kind), sent in of_rank["bytes_sent"].items():
            forward, backward, evaluation = ([x for _, x in of_phase] for of_phase in sent)
            rows = num_rows * (dim * dtype.itemsize + LABEL_BYTES)
            statistics = num_rows * STATISTICS_BYTES
            first, sums, parts = [RECORD_BYTES, rows], SUM_BYTES, []
            if kind != "rows":  # of every rank's columns, the sums and a part of the gradient
                every = 3 * num_rows - 3  # one and two fewer on two of the ranks
                first.append(every * STATISTICS_BYTES)
                if kind == "one_positive":  # first what is known of negatives, and then four sums
                    first[2:] = [every * 8, num_rows * 8, every * (STATISTICS_BYTES + 8)]
                sums, parts = 2 * SUM_BYTES, [every * dim * 4]
            assert forward == [*first, sums + statistics]
            assert backward == parts
            assert evaluation == [*first, sums]


def test_both_directions_of_a_rank_are_of_one_set_of_scores(found):
    rows_of_ranks = [5, 4, 3]
    for of_rank, num_rows in zip(found, rows_of_ranks):
        scores = num_rows * sum(rows_of_ranks) * 8
        # Of 16 bits, in the forward and in the backward; a product with either side is in two parts.
        for denominator, num_forwards in (("all", 1), ("one_positive", 2)):
            by_tiled, by_native = of_rank["products_made"][denominator]
            assert by_tiled == (num_forwards + 1 + 2 + 2) * scores
            assert by_native == [(num_rows, sum(rows_of_ranks), True)] * (num_forwards + 1)


@pytest.mark.parametrize("name", loss_ranks.DISAGREEMENTS)
def test_ranks_that_disagree_are_told_so(found, name):
    for of_rank in found[:3]:
        error, message, seconds = of_rank["disagreements"]["disagrees", name]
        assert error == "ValueError"
        assert f"{name} must be alike on every rank of group, got " in message
        assert "on ranks 0, 2; " in message
        assert "on rank 1" in message
        assert seconds < 30


@pytest.mark.parametrize("name", loss_ranks.FAILURES)
def test_a_rank_that_fails_is_named_to_the_others(found, name):
    own, said, _ = found[1]["disagreements"]["fails", name]
    assert said.startswith(f"{name} must ")
    for rank in (0, 2):
        error, message, seconds = found[rank]["disagreements"]["fails", name]
        assert error == "ValueError"
        assert message.endswith(f"got errors from rank 1 ({own}: {said})")
        assert seconds < 30


def test_queues_stay_equal(found):
    rows = [0, 0, 2, 10, 11, 11, 11, 11, 12, 12, 12][-10:]
    for of_rank in found[:3]:
        features, labels = of_rank["queues"]
        assert features[:, 0].tolist() == rows
        assert labels.tolist() == [row % 10 for row in rows]
        for kind, name in (("dim", "features"), ("size", "size")):
            refusal = of_rank["disagreements"]["disagrees", kind][1]
            assert f"{name} must be alike on every rank of group" in refusal


def test_gradients_that_only_some_want(found):
    arguments = by_id("memory").arguments()
    shares = calls_of_ranks.shares(arguments, 2)
    leaves = [
        torch.as_tensor(arguments[name], dtype=torch.float64).requires_grad_() for name in LEAVES
    ]
    loss = supcon_loss(**{**arguments, **dict(zip(LEAVES, leaves))}, backend="reference")
    features, contrasts, temperature = torch.autograd.grad(loss, leaves)
    results = [of_rank["gradients_that_few_want"] for of_rank in found[:2]]
    for rank, result in enumerate(results):
        torch.testing.assert_close(result[0]["features"], 2 * features[shares[rank][0]])
        assert result[3] == {}
    assert results[0][1] == {}
    torch.testing.assert_close(results[1][1]["contrast_features"], 2 * contrasts[shares[1][1]])
    mean = (results[0][2]["temperature"] + results[1][2]["temperature"]) / 2
    torch.testing.assert_close(mean, temperature)


def test_gradients_of_both_sides_that_only_some_want(found):
    arguments = by_id("symmetric_memory").arguments()
    sides = ["features", "contrast_features"]
    leaves = [arguments[name].requires_grad_() for name in sides]
    loss = supcon_loss(**{**arguments, **dict(zip(sides, leaves))}, backend="reference")
    gradients = torch.autograd.grad(loss, leaves)
    shares = calls_of_ranks.shares(arguments, 2)
    for rank in range(2):
        refused, gradient, twice = found[rank]["gradients_of_both_sides_that_few_want"]
        assert refused[1].startswith("contrast_features must require grad on no rank of group")
        torch.testing.assert_close(gradient, 2 * gradients[rank][shares[rank][rank]])
        assert all("differentiated twice" in message for _, message, _ in twice)


def test_a_rank_hears_of_what_is_not_finite_on_another(found):
    for of_rank in found[:2]:
        assert set(of_rank["what_is_not_finite"].values()) == {(True, True)}


def test_module_autocast_compilation_and_second_derivatives(found):
    for of_rank in found[:2]:
        loss, under_autocast, twice = of_rank["machinery"]
        assert torch.equal(loss, found[0]["machinery"][0])
        assert torch.equal(loss, under_autocast)
        assert "differentiated twice" in twice[1]


def test_a_compiled_call_is_whole(found):
    for of_rank in found[:2]:
        calls, refused = of_rank["compiled"]
        assert set(calls) == {"labels", "memory", "towers", "one positive"}
        for expected, in_one_graph in calls.values():
            for ours, want in zip(in_one_graph, expected, strict=True):
                torch.testing.assert_close(ours, want)
        assert "requires_grad must be alike on every rank of group" in refused[1]


def test_a_call_is_compiled_once_for_all_sizes(found):
    for of_rank in found[:2]:
        calls, num_graphs, (by_width, by_temperature) = of_rank["compiled_for_all_sizes"]
        assert num_graphs[0] == num_graphs[1] < num_graphs[2]  # which has other numbers
        for expected, in_one_graph in calls:
            for ours, want in zip(in_one_graph, expected, strict=True):
                torch.testing.assert_close(ours, want)
        said = "must be alike on every rank of group, got"
        shapes = [f"torch.float64 of shape (·, 2, {d}) on cpu on rank {d - 8}" for d in (8, 9)]
        # Behind it torch 2.5 says where in the graph.
        assert by_width[1].startswith(f"features {said} {'; '.join(shapes)}")
        assert by_temperature[1].startswith(f"temperature {said} 0.1 on rank 0; 1.1 on rank 1")


def test_a_group_is_a_group_that_one_is_in(found):
    for rank, of_rank in enumerate(found):
        no_group, no_name, *not_ours = of_rank["groups_that_are_none"]
        assert no_group[0] == "TypeError"
        assert no_name[0] == "ValueError"
        accepted = "group must be a torch.distributed.ProcessGroup, 'world', 'local' or None, got "
        assert no_group[1] == accepted + "int"
        assert no_name[1] == accepted + "'all'"
        assert len(not_ours) == (rank >= 2)
        for error, message, _ in not_ours:
            assert error == "ValueError"
            assert message.startswith("group must contain this process")


def test_a_group_by_its_name(found):
    for rank, of_rank in enumerate(found):
        losses, said_by_names, said = of_rank["groups_by_name"]
        assert torch.equal(losses["world"], losses["group"])
        assert torch.equal(losses["local"], losses["None"])
        assert not torch.equal(losses["local"], losses["group"])
        assert said_by_names == []
        assert len(said) == (rank == 0)  # once, and by one rank
        assert all("group='world'" in message for message in said)


def test_a_group_by_its_name_in_a_process_alone():
    features, labels = torch.randn(6, 3), torch.arange(6) % 2
    expected = supcon_loss(features, labels)
    for name in ("world", "local"):
        assert torch.equal(supcon_loss(features, labels, group=name), expected)


def test_ranks_tell_each_other_from_the_device_of_their_features(monkeypatch):
    monkeypatch.setattr(ranks.dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
    group = torch.distributed.ProcessGroup(0, 2)
    with FakeTensorMode():
        features = torch.empty(2, 3, device="cuda:1")
    for config, given, device in (
        ("cuda:nccl", features, "cuda:1"),
        ("cpu:gloo,cuda:nccl", features, "cpu"),
        ("cuda:nccl", None, "cuda"),
    ):
        monkeypatch.setattr(ranks.dist, "get_backend_config", lambda group, c=config: c)
        assert ranks.Membership.of(group, given).device == torch.device(device)


def test_a_rank_that_stays_away_ends_the_others_after_the_timeout(found):
    for rank in (0, 2, 3):
        error, _, seconds = found[rank]["a_rank_that_stays_away"]
        assert error
        assert seconds < 30


def test_without_torch_distributed(monkeypatch):
    features, labels = torch.randn(4, 3), torch.arange(4) % 2
    monkeypatch.setattr(ranks, "dist", types.SimpleNamespace(is_available=lambda: False))
    assert math.isfinite(supcon_loss(features, labels))
    with pytest.raises(ValueError, match=r"^group must be None where torch\.distributed is"):
        supcon_loss(features, labels, group=object())
