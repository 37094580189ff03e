"""The estimate of a step's memory, against what steps of small networks really hold."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import test_train_recipes
import train_fixtures  # noqa: F401  puts train/ on the path
from train_parts import load_data, options_of, trainer_of
from training import memory
from training.memory import SavedTensors, estimate_memory, fitting_chunk, num_bytes, say_memory

BATCH_SIZE = 24
TINY = {"model": "resnet10", "width": 4, "image_size": 16}
STANDARD = {"stem": "standard", "image_size": 32}
OPTIONS = {
    "fp32": {**TINY, "optimizer": "lars", "ema_decay": 0.9},
    "bf16": {**TINY, "precision": "bf16", "optimizer": "rmsprop", "head": "linear"},
    "chunks": {**TINY, "grad_cache_chunk": 10, "num_views": 3},
    "queue": {**TINY, "queue_size": 64},
    "cmc": {**TINY, "method": "cmc"},
    "cmc of one view": {**TINY, "method": "cmc", "num_views": 1},
    "standard stem": {**STANDARD, "model": "resnet18", "normalize_embedding": True},
    "layer norm": {**STANDARD, "model": "test_convnext", "optimizer": "adamw", "precision": "bf16"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_estimate_is_what_a_step_holds(name):
    options = options_of(batch_size=BATCH_SIZE, warmup_epochs=0, device="cpu", **OPTIONS[name])
    data = load_data(options)
    trainer = trainer_of(options, data)
    networks = [trainer.model]
    if options.method.method == "cmc":
        networks.append(trainer.method.second)
    held = [0] * len(networks)
    for number, (model, forward) in enumerate([(each, each.forward) for each in networks]):

        def counted(rows, number=number, model=model, forward=forward):
            saved = SavedTensors([*model.parameters(), *model.buffers(), rows])
            with saved:
                result = forward(rows)
            held[number] = max(held[number], sum(saved.sizes()))
            return result

        model.forward = counted
    images, labels = data.train[list(range(BATCH_SIZE))]
    trainer.step(images, labels, 0)

    found = estimate_memory(
        options, data, num_views=trainer.num_views, num_embedded=trainer.method.num_embedded
    )
    assert found.activations == pytest.approx(sum(held), rel=0.01)
    parts = (trainer.model, trainer.average, trainer.method)
    weights = [part for part in parts if part is not None]
    tensors = [t for part in weights for t in part.state_dict().values() if "float" in str(t.dtype)]
    queue = num_bytes([trainer.method.queue.features]) if name == "queue" else 0
    gradients = num_bytes(weight.grad for weight in trainer.trained)
    assert found.weights == pytest.approx(num_bytes(tensors) + gradients - queue, rel=0.01)
    state = trainer.optimizer.state.values()
    assert found.optimizer == num_bytes(
        value for part in state for value in part.values() if isinstance(value, torch.Tensor)
    )


@pytest.mark.parametrize(
    "name", [name for name in test_train_recipes.RECIPES if "imagenet" in name]
)
def test_imagenet_recipes_fit_eight_cards_of_80_gb(name):
    options = test_train_recipes.read(name)
    data = test_train_recipes.stand_in(options)
    num_embedded = 1 if options.method.num_keys else 2
    found = estimate_memory(options, data, num_views=2, num_embedded=num_embedded, world_size=8)
    assert found.total < memory.USABLE * 80e9


def test_more_than_a_gpu_has_is_said_with_what_fits(monkeypatch, capsys):
    options = options_of(batch_size=BATCH_SIZE, warmup_epochs=0, **TINY)
    data = load_data(options)
    trainer = trainer_of(options, data)
    say_memory(options, data, trainer)
    said = capsys.readouterr()
    assert said.out.startswith("estimated memory of a step: 0.0") and said.err == ""

    trainer.device = torch.device("cuda")
    found = estimate_memory(options, data, num_views=2)
    for share, words in ((2, ""), (0.9, "warning: it may not fit"), (0.01, "warning: it may")):
        about = SimpleNamespace(total_memory=int(share * found.total))
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda device, about=about: about)
        say_memory(options, data, trainer)
        warned = capsys.readouterr().err
        assert warned.startswith(words) and bool(words) == bool(warned)
        chunk = fitting_chunk(found, 2 * BATCH_SIZE, about.total_memory)
        assert (f"--grad_cache_chunk {chunk}" in warned) == (share == 0.9)
        if share == 0.9:
            fits = options.changed(grad_cache_chunk=chunk)
            assert estimate_memory(fits, data, num_views=2).total <= 0.9 * about.total_memory

    options = options.changed(model="no such network")
    say_memory(options, data, replace(trainer))
    assert capsys.readouterr().out.startswith("no estimate of memory for --model no such network")
