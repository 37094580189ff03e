"""The ranks of tests/test_distributed.py: one process of four, which leaves what it found in a file.

Every check runs on the first ranks of the four, in a group of their own. They are few processes
for many checks, since starting them takes longer than all checks together.
"""

from __future__ import annotations

import collections
import datetime
import functools
import itertools
import os
import pathlib
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from calls_of_ranks import interpreted_plan, own_part, plan, shares, table
from cases import NOWHERE, by_id, classes, randn
from compare import LEAVES
from supcon_kernels import LabelQueue, SupConLoss, products, ranks, supcon_loss, triton_run
from supcon_kernels.backends import native, tiled

# Made before the process group.
EARLY = {name: SupConLoss(base_temperature=None, group=name) for name in ("world", "local")}
CHECKS: list[tuple[str, int, Callable[[Any], Any]]] = []


def check(world: int) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Run the function on the first ``world`` ranks, with their group, and keep what it returns."""

    def enter(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        CHECKS.append((function.__name__, world, function))
        return function

    return enter


def network() -> torch.nn.Module:
    torch.manual_seed(3)
    layers = torch.nn.Linear(7, 11), torch.nn.Tanh(), torch.nn.Linear(11, 5)
    return torch.nn.Sequential(*layers).double()


class Learner(torch.nn.Module):
    """A network whose temperature is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()
        self.temperature = torch.nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.network(x.flatten(0, 1)).view(*x.shape[:2], 5), self.temperature.clone()


def training_data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    return torch.randn(24, 2, 7, generator=g).double(), torch.randint(4, (24,), generator=g)


@check(3)
def parameter_gradients(group):
    model = torch.nn.parallel.DistributedDataParallel(Learner(), process_group=group)
    x, labels = training_data()
    own = shares({"features": x}, 3)[dist.get_rank(group)][0]
    features, temperature = model(x[own])
    supcon_loss(features, labels[own], temperature=temperature, group=group).backward()
    return [p.grad for p in model.parameters()]


class Counter(TorchDispatchMode):
    """Every collective and what it was given to send, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            foreseen = ("allgather_base", "alltoall_base")
            assert any(name in func._opname for name in foreseen), f"{func} was not foreseen"
            self.sent.append((func._opname, args[1].nbytes))
        return func(*args, **(kwargs or {}))


@check(3)
def bytes_sent(group):
    found = {}
    rank = dist.get_rank(group)
    for num_rows, dim, dtype in ((32, 16, torch.float32), (48, 20, torch.bfloat16)):
        features = torch.randn(num_rows - rank, dim, dtype=dtype, requires_grad=True)
        others = torch.randn_like(features, requires_grad=True)
        labels = torch.arange(num_rows - rank) % 4
        of_others = {"contrast_features": others, "contrast_labels": labels, "symmetric": True}
        of_one = {**of_others, "denominator": "one_positive"}
        for kind, more in {"rows": {}, "both": of_others, "one_positive": of_one}.items():
            with Counter() as forward:
                loss = supcon_loss(features, labels, **more, group=group)
            with Counter() as backward:
                loss.backward()
            with Counter() as evaluation, torch.no_grad():
                supcon_loss(features, labels, **more, group=group)
            sent = forward.sent, backward.sent, evaluation.sent
            found[num_rows, dim, dtype, kind] = sent
    return found


@check(3)
def products_made(group):
    """By denominator: multiplications of this rank by tiled, and what native is asked for."""
    rank = dist.get_rank(group)
    g = torch.Generator().manual_seed(rank)
    images, texts = (randn(g, 5 - rank, 8).bfloat16().requires_grad_() for _ in range(2))
    found = {}
    made: list[int] = []

    def accumulated(a: Tensor, b: Tensor) -> Tensor:
        made.append(a.numel() * b.shape[1])
        return a.float() @ b.float()

    call = {"contrast_features": texts, "symmetric": True, "group": group}
    for denominator in ("all", "one_positive"):
        made.clear()
        with (
            mock.patch.object(products, "accumulated", accumulated),
            mock.patch.object(tiled, "short_dtype", lambda x: x.dtype),
        ):
            supcon_loss(images, **call, denominator=denominator, backend="tiled").backward()
        with mock.patch.object(native, "_call", wraps=native._call) as calls:
            supcon_loss(images, **call, denominator=denominator, backend="native").backward()
        asked = [x.args[0] for x in calls.call_args_list]
        found[denominator] = sum(made), [(x.num_rows, x.num_cols, x.symmetric) for x in asked]
    return found


def refusal(call: Callable[[], object]) -> tuple[str, str, float]:
    """The error that the call raises, and after how many seconds."""
    start = time.perf_counter()
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error), time.perf_counter() - start
    return "", "", time.perf_counter() - start


DISAGREEMENTS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.2},
    "summation": {"summation": "in"},
    "denominator": {"denominator": "one_positive"},
    "contrast_mode": {"contrast_mode": "one"},
    "reduction": {"reduction": "sum"},
    "normalize": {"normalize": False},
    "ignore_index": {"ignore_index": -1},
    "base_temperature": {"base_temperature": 0.07},
    "backend": {"backend": "tiled"},
    "labels": {"labels": torch.rand(6, 3)},
    "features": {"features": torch.randn(6, 2, 5)},
    "contrast_features": {
        "contrast_features": torch.randn(6, 4),
        "contrast_labels": torch.arange(6) % 2,
    },
    "symmetric": {
        "contrast_features": torch.randn(6, 4),
        "contrast_labels": torch.arange(6) % 2,
        "symmetric": True,
    },
}
FAILURES: dict[str, dict[str, Any]] = {
    "features": {"features": [[1.0]]},
    "labels": {"labels": torch.zeros(5, dtype=torch.int64)},
    "temperature": {"temperature": -1.0},
    "mask": {"labels": None, "mask": torch.ones(6, 6)},
    "reduction": {"reduction": "none"},
    "backend": {"backend": "reference"},
}


@check(3)
def disagreements(group):
    own: dict[str, Any] = {"features": torch.randn(6, 2, 4), "labels": torch.arange(6) % 2}
    found = {}
    for kind, changes in (("disagrees", DISAGREEMENTS), ("fails", FAILURES)):
        for name, change in changes.items():
            changed = {**own, **(change if dist.get_rank(group) == 1 else {})}
            found[kind, name] = refusal(lambda c=changed: supcon_loss(**c, group=group))
            loss = supcon_loss(**own, group=group)  # the group is as good as before
            assert loss.isfinite()
    uneven = dist.get_rank(group) // 2
    for name, queue in (("dim", LabelQueue(8, 4 + uneven)), ("size", LabelQueue(8 + uneven, 4))):
        rows = torch.randn(2, queue.features.shape[1])
        enqueue = functools.partial(queue.enqueue, rows, torch.zeros(2).long(), group=group)
        found["disagrees", name] = refusal(enqueue)
    return found


@check(3)
def queues(group):
    rank = dist.get_rank(group)
    queue = LabelQueue(10, 3, dtype=torch.float64)
    for step, lengths in enumerate(([2, 0, 1], [1, 4, 3], [0, 0, 0])):
        rows = torch.full((lengths[rank], 3), 10.0 * step + rank)
        queue.enqueue(rows, torch.full((lengths[rank],), rank), group=group)
    return queue.features, queue.labels


@check(2)
def gradients_that_few_want(group):
    """Only some ranks, or only the temperature, require grad."""
    rank = dist.get_rank(group)
    arguments = by_id("memory").arguments()
    found = []
    for names in (["features"], ["contrast_features"], ["temperature"], []):
        part = own_part(arguments, 2, rank, torch.float64)
        for name in LEAVES:
            part[name].requires_grad_(name in names and (rank == 1 or name != "contrast_features"))
        loss = supcon_loss(**part, group=group)
        if loss.requires_grad:
            loss.backward()
        found.append({name: part[name].grad for name in names if part[name].requires_grad})
    with torch.no_grad():
        assert not supcon_loss(**part, group=group).requires_grad
    return found


@check(2)
def gradients_of_both_sides_that_few_want(group):
    """What is refused where one rank wants nothing; gradients where each wants one; and their gradient."""
    rank = dist.get_rank(group)
    part = own_part(by_id("symmetric_memory").arguments(), 2, rank, torch.float64)
    part |= {name: part[name].detach() for name in LEAVES}
    sides = ["features", "contrast_features"]
    wanting = {name: part[name].clone().requires_grad_() for name in sides}
    refused = refusal(lambda: supcon_loss(**part | (wanting if rank else {}), group=group))
    found = supcon_loss(**part | {sides[rank]: wanting[sides[rank]]}, group=group)
    (gradient,) = torch.autograd.grad(found, wanting[sides[rank]])
    twice = []
    for names in (sides, sides[:1], sides[1:]):
        loss = supcon_loss(**part | {name: wanting[name] for name in names}, group=group)
        (again,) = torch.autograd.grad(loss, wanting[names[-1]], create_graph=True)
        twice.append(refusal(lambda x=again: x.sum().backward()))
    return refused, gradient, twice


@check(2)
def what_is_not_finite(group):
    """Whether everything is NaN on a rank that has only numbers, beside one that has not."""
    rank = dist.get_rank(group)
    found = {}
    for name, backend in itertools.product(("ragged", "symmetric_memory"), ("tiled", "native")):
        part = own_part(by_id(name).arguments(), 2, rank, torch.float32)
        if rank == 1:
            with torch.no_grad():
                part["features"][part["labels"] != NOWHERE] = torch.nan
        loss = supcon_loss(**part, backend=backend, group=group)
        loss.backward()
        takes_part = (part["labels"] != NOWHERE) & (part["features"] != 0).flatten(1).any(dim=1)
        gradient = part["features"].grad[takes_part]
        found[name, backend] = loss.isnan().item(), gradient.isnan().any(dim=-1).all().item()
    return found


@check(2)
def machinery(group):
    """The module, autocast and differentiating twice."""
    torch.manual_seed(dist.get_rank(group))
    features = torch.randn(6, 2, 4, requires_grad=True)
    labels = torch.arange(6) % 3
    criterion = SupConLoss(0.1, group=group)
    loss = criterion(features, labels)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = criterion(features, labels)
    (gradient,) = torch.autograd.grad(loss, features, create_graph=True)
    twice = refusal(lambda: gradient.sum().backward())
    return loss.detach(), under_autocast.detach(), twice


@check(2)
def compiled(group):
    """Losses and gradients, and the same in one graph; no two ranks have equally many rows."""
    g = torch.Generator().manual_seed(dist.get_rank(group))
    num_rows = 5 + 3 * dist.get_rank(group)
    rows, others = randn(g, num_rows, 2, 8), randn(g, num_rows + 2, 8)
    tau, labels = torch.tensor(0.2), classes(g, num_rows, 3)
    memory = {"labels": labels, "contrast_labels": classes(g, num_rows + 2, 3)}
    found = {}
    for name, x, targets, options in (
        ("labels", (rows,), {"labels": labels}, {"reduction": "sum"}),
        ("memory", (rows[:, 0], others), memory, {}),
        ("towers", (rows[:, 0], others[:num_rows]), {}, {"symmetric": True}),
        (
            "one positive",
            (rows[:, 0], others[:num_rows]),
            {},
            {"symmetric": True, "denominator": "one_positive"},
        ),
    ):

        def step(features, temperature, *contrasts, given=(targets, options)):
            others = {"contrast_features": contrasts[0]} if contrasts else {}
            targets, options = given
            call = {**others, **targets, **options, "temperature": temperature}
            return supcon_loss(features * 2, **call, group=group) * 3

        torch._dynamo.reset()
        # The whole compiler once, and what it starts from for the others: it takes seconds.
        compiler = "inductor" if name == "towers" else "aot_eager"
        in_one_graph = torch.compile(step, backend=compiler, fullgraph=True)
        found[name] = [_differentiated(f, x[0], tau, *x[1:]) for f in (step, in_one_graph)]
    torch._dynamo.reset()
    frozen = torch.compile(lambda x: supcon_loss(x, group=group), backend="aot_eager")
    leaf = rows.requires_grad_(dist.get_rank(group) == 0)
    return found, refusal(lambda: frozen(leaf))


@check(2)
def compiled_for_all_sizes(group):
    """Losses and gradients whose sizes and numbers change, as they are and compiled; how many graphs
    there are after each; and what is said where they are not alike.
    """

    def step(features, soft, temperature, base):
        options = {"temperature": temperature, "base_temperature": base}
        return supcon_loss(features, soft, **options, group=group)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    in_one_graph = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    g, rank = torch.Generator().manual_seed(dist.get_rank(group)), dist.get_rank(group)
    found, num_graphs = [], []
    for width, num_classes, tau, base in ((8, 3, 0.1, 1.0), (12, 4, 0.1, 1.0), (16, 5, 0.3, 0.7)):
        features = randn(g, 5 + rank, 2, width)
        soft = torch.rand(5 + rank, num_classes, generator=g)
        found.append(
            [
                _differentiated(lambda x, f=f, more=(soft, tau, base): f(x, *more), features)
                for f in (step, in_one_graph)
            ]
        )
        num_graphs.append(counter.frame_count)
    unlike = [(randn(g, 5, 2, 8 + rank), 0.1), (randn(g, 5, 2, 8), 0.1 + rank)]
    refused = [refusal(lambda x=x, t=t: in_one_graph(x, soft[:5], t, 1.0)) for x, t in unlike]
    return found, num_graphs, refused


def _differentiated(step: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss = step(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@check(4)
def groups_that_are_none(group):
    features, labels = torch.randn(4, 3), torch.arange(4) % 2
    pair = dist.new_group([0, 1])
    found = [refusal(lambda name=g: supcon_loss(features, labels, group=name)) for g in (0, "all")]
    if dist.get_rank() >= 2:
        found.append(refusal(lambda: supcon_loss(features, labels, group=pair)))
    return found


@check(4)
def groups_by_name(group):
    """The loss of all, from criteria made before there was a group; of this rank; and what is said."""
    torch.manual_seed(dist.get_rank())
    features, labels = torch.randn(6, 3), torch.arange(6) % 2
    ranks._warn_of_local_rows.cache_clear()  # the table was made in this process
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        losses = {name: criterion(features, labels) for name, criterion in EARLY.items()}
        said_by_names = [str(w.message) for w in said]
        for _ in range(2):
            losses["None"] = supcon_loss(features, labels)
    losses["group"] = supcon_loss(features, labels, group=group)
    return losses, said_by_names, [str(w.message) for w in said]


@check(4)
def a_rank_that_stays_away(group):
    """The others raise after the group's timeout. The last check: the group is of no use after it."""
    dist.barrier()  # its timeout is that of its making, too
    impatient = dist.new_group(timeout=datetime.timedelta(seconds=3))
    if dist.get_rank() == 1:
        time.sleep(5)
        return None
    return refusal(lambda: supcon_loss(torch.randn(4, 3), torch.arange(4) % 2, group=impatient))


def launches_of_a_memory(group: Any) -> list[dict[str, int]]:
    """Kernels by name, forward and backward, with contrasts that take no gradient and with ones that do."""
    g = torch.Generator().manual_seed(dist.get_rank())
    found = []
    for needs_cols in (False, True):
        features = torch.randn(6, 5, generator=g).requires_grad_()
        memory = torch.randn(9, 5, generator=g).requires_grad_(needs_cols)
        labels = torch.arange(9) % 2
        with mock.patch.object(triton_run, "run", wraps=triton_run.run) as run:
            loss = supcon_loss(
                features,
                labels[:6],
                contrast_features=memory,
                contrast_labels=labels,
                backend="triton",
                group=group,
            )
            loss.backward()
        found.append(dict(collections.Counter(c.args[0].kernel for c in run.call_args_list)))
    return found


def main(rank: int, num_ranks: int, directory: pathlib.Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(directory / "store"), num_ranks)
    timeout = datetime.timedelta(seconds=90)
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks, store=store, timeout=timeout)
    groups = {world: dist.new_group(list(range(world))) for world in range(1, num_ranks + 1)}
    found: dict[str, Any] = {}
    if os.environ.get("TRITON_INTERPRET"):
        found["table"] = table(interpreted_plan(), rank, groups)
        found["launches"] = launches_of_a_memory(groups[2])
    else:
        found["table"] = table(plan(), rank, groups)
        for name, world, function in CHECKS:
            if rank < world:
                found[name] = function(groups[world])
    torch.save(found, directory / f"rank{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]))
