"""The gradient of a batch that is encoded chunk by chunk."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from supcon_kernels import grad_cache_backward, supcon_loss

NUM_ROWS = 22
SPLITS = {"one chunk": 22, "ragged chunks": 5, "single rows": 1}


def make_network(*, batch_norm: bool = False, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(16) if batch_norm else nn.Identity()
    network = nn.Sequential(
        nn.Linear(7, 16), norm, nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 4)
    )
    return network.double()


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(NUM_ROWS, 7, generator=g, dtype=torch.float64), torch.arange(NUM_ROWS) % 4


def loss_of(rows: torch.Tensor) -> torch.Tensor:
    return supcon_loss(rows, torch.arange(NUM_ROWS) % 4, temperature=0.2)


def gradients(module: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]


def assert_equal(found, expected) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", SPLITS.values(), ids=SPLITS)
def test_the_gradient_is_that_of_the_whole_batch(size):
    images, _ = make_batch()
    network = make_network()
    loss = loss_of(network(images))
    loss.backward()
    expected = gradients(network)
    other = make_network()
    found = grad_cache_backward(other, images.split(size), loss_of)
    assert_equal(found, loss.detach())
    assert not found.requires_grad
    assert_equal(gradients(other), expected)


@pytest.mark.parametrize("batch_norm, dropout", [(False, 0.5), (True, 0.0), (True, 0.5)])
def test_chunks_see_the_same_chance_and_count_once(batch_norm, dropout):
    images, _ = make_batch()
    chunks = images.split(6)
    network = make_network(batch_norm=batch_norm, dropout=dropout)
    other = copy.deepcopy(network)
    torch.manual_seed(5)
    loss = loss_of(torch.cat([network(chunk) for chunk in chunks]))
    loss.backward()
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert_equal(grad_cache_backward(other, chunks, loss_of), loss.detach())
    assert torch.equal(torch.rand(3), drawn)
    assert_equal(gradients(other), gradients(network))
    for one, two in zip(other.buffers(), network.buffers(), strict=True):
        assert torch.equal(one, two)


def test_gradients_add_up():
    images, _ = make_batch()
    once, twice = make_network(), make_network()
    grad_cache_backward(once, images.split(6), loss_of)
    for _ in range(2):
        grad_cache_backward(twice, images.split(6), loss_of)
    assert_equal(gradients(twice), [2 * g for g in gradients(once)])


def test_a_learned_temperature_gets_its_gradient():
    images, labels = make_batch()

    def gradient(backward):
        temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        backward(make_network(), lambda x: supcon_loss(x, labels, temperature=temperature))
        return temperature.grad

    expected = gradient(lambda network, loss: loss(network(images)).backward())
    assert expected != 0
    found = gradient(lambda network, loss: grad_cache_backward(network, images.split(6), loss))
    assert_equal(found, expected)


def test_views_are_rows_and_a_function_may_encode_them():
    images, labels = make_batch()
    network = make_network(batch_norm=True).float()
    other = copy.deepcopy(network)

    def encode(module, chunk):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(chunk["images"]).float()

    def loss(rows):
        return supcon_loss(rows.unflatten(0, (2, -1)).transpose(0, 1), labels[: NUM_ROWS // 2])

    chunks = [{"images": chunk.float()} for chunk in images.split(6)]
    expected = loss(torch.cat([encode(network, chunk) for chunk in chunks]))
    (1024 * expected).backward()
    found = grad_cache_backward(
        lambda chunk: encode(other, chunk), chunks, loss, model=other, scale=lambda x: 1024 * x
    )
    assert torch.equal(found, expected)
    torch.testing.assert_close(gradients(other), gradients(network))
    for one, two in zip(other.buffers(), network.buffers(), strict=True):
        assert torch.equal(one, two)


def test_autocast_around_the_call_loses_no_gradient():
    images, _ = make_batch()
    network = make_network().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grad_cache_backward(network, images.float().split(6), loss_of)
    assert len(gradients(network)) == 4


def test_random_numbers_go_on_after_those_of_the_loss():
    images, _ = make_batch()

    def loss_with_noise(rows):
        return loss_of(rows + torch.rand_like(rows))

    torch.manual_seed(5)
    network = make_network(dropout=0.5)
    loss_with_noise(torch.cat([network(chunk) for chunk in images.split(6)]))
    expected = torch.rand(3)
    torch.manual_seed(5)
    grad_cache_backward(make_network(dropout=0.5), images.split(6), loss_with_noise)
    assert torch.equal(torch.rand(3), expected)


def test_chunks_see_the_same_chance_on_mps(monkeypatch):
    generator = torch.Generator()  # in the place of that of MPS
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr("torch.mps.get_rng_state", generator.get_state)
    monkeypatch.setattr("torch.mps.set_rng_state", generator.set_state)
    images, _ = make_batch()
    drawn = []

    def encode(chunk):
        drawn.append(torch.rand(chunk.shape, generator=generator))
        return network(chunk * drawn[-1])

    network = make_network()
    grad_cache_backward(encode, images.split(6), loss_of, model=network)
    first, second = drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


class FailsAt(nn.Module):
    """A network that raises at its k-th call."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.network, self.calls_left = make_network(batch_norm=True, dropout=0.5), k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.network(x)
        self.calls_left -= 1
        if self.calls_left == 0:
            raise RuntimeError("out of memory")
        return rows


@pytest.mark.parametrize("accumulated", [True, False], ids=["gradients before", "none before"])
@pytest.mark.parametrize("call", [3, 6], ids=["first pass", "second pass"])
def test_a_failure_leaves_everything_as_it_was(call, accumulated):
    images, labels = make_batch()
    model = FailsAt(call)
    temperature = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
    leaves = [*model.parameters(), temperature]
    for leaf in leaves if accumulated else []:
        leaf.grad = torch.ones_like(leaf)
    before = [buffer.clone() for buffer in model.buffers()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with pytest.raises(RuntimeError, match="out of memory"):
        grad_cache_backward(
            model, images.split(6), lambda rows: supcon_loss(rows, labels, temperature=temperature)
        )
    assert model.calls_left == 0
    assert torch.equal(torch.rand(3), expected)
    for found, value in zip(model.buffers(), before, strict=True):
        assert torch.equal(found, value)
    for leaf in leaves:
        assert torch.equal(leaf.grad, torch.ones_like(leaf)) if accumulated else leaf.grad is None


def test_a_compiled_network_that_averages_gradients_does_so_once(tmp_path):
    images, _ = make_batch()
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        averaged = []

        def hook(_, bucket):
            averaged.append(bucket.index())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        ddp = nn.parallel.DistributedDataParallel(make_network())
        ddp.register_comm_hook(None, hook)
        grad_cache_backward(torch.compile(ddp, backend="aot_eager"), images.split(6), loss_of)
    finally:
        torch.distributed.destroy_process_group()
    assert averaged == [0]


@pytest.mark.parametrize(
    "loss_function, error, said",
    [
        (lambda rows: torch.tensor(1.0), ValueError, "depends on the embeddings"),
        (lambda rows: nn.Parameter(torch.tensor(1.0)) * 2, ValueError, "depends on the embeddings"),
        (lambda rows: rows, TypeError, "0-dim"),
        (lambda rows: 1.0, TypeError, "0-dim"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss_function, error, said):
    images, _ = make_batch()
    with pytest.raises(error, match=f"^loss_function must .*{said}"):
        grad_cache_backward(make_network(), images.split(6), loss_function)


def test_a_call_without_gradients_is_refused():
    images, _ = make_batch()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"outside torch\.no_grad"):
        grad_cache_backward(make_network(), images.split(6), loss_of)


def test_what_cannot_be_encoded_twice_is_refused():
    images, _ = make_batch()
    with pytest.raises(TypeError, match="chunks must be a sequence"):
        grad_cache_backward(make_network(), iter(images.split(6)), loss_of)
    with pytest.raises(ValueError, match="chunks must hold at least one"):
        grad_cache_backward(make_network(), [], loss_of)
    with pytest.raises(TypeError, match="encode must return a tensor"):
        grad_cache_backward(lambda chunk: [chunk], [images], loss_of)
