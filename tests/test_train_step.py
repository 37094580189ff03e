"""A training step in other precisions, memory formats and compiled: what stays the same."""

import copy
import json
from functools import partial
from itertools import pairwise

import pytest
import torch

import train_fixtures  # noqa: F401  puts train/ on the path
from run.clock import PHASES
from supcon_kernels import supcon_loss
from train_fixtures import metrics, pretrain, weights
from train_parts import SmallEncoder, load_checkpoint, load_data, options_of, trainer_of
from training.trainer import AUTOCAST, Trainer

SHORT = ("--batch_size", 256, "--max_steps", 6, "--save_every", 4, "--keep", 9, "--knn_bank", 100)
SCALE = 256.0
# Without batch norm, whose statistics are those of a chunk.
NO_STATISTICS = {"model": "test_convnext", "stem": "standard", "image_size": 32}


@pytest.fixture(autouse=True)
def small_start(monkeypatch):
    """A scale that this network does not overflow at, and no pictures."""
    scaler = partial(torch.amp.GradScaler, init_scale=SCALE)
    monkeypatch.setattr("torch.amp.GradScaler", scaler)
    monkeypatch.setattr("pretrain.draw", lambda *arguments: None)


def trainer_and_batch(**options):
    config = options_of(
        **{"model": "resnet10", "width": 4, "image_size": 8, **options},
        warmup_epochs=0,
        device="cpu",
    )
    data = load_data(config)
    trainer = trainer_of(config, data)
    return trainer, data.train.images[:64], data.train.labels[:64]


@pytest.mark.parametrize("chunk", [(), ("--grad_cache_chunk", 100)], ids=["whole", "chunks"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_resumes_to_the_bit(tmp_path, precision, chunk):
    options = (*SHORT, "--precision", precision, *chunk)
    whole = pretrain(tmp_path / "whole", *options)
    other = pretrain(tmp_path / "other", *options)
    resumed = pretrain(tmp_path / "other", *options, "--resume", other / "step-4.pt")
    assert metrics(resumed) == metrics(whole)
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())
    scalers = [load_checkpoint(run / "last.pt")["scaler"] for run in (resumed, whole)]
    assert scalers[0] == scalers[1]
    assert bool(scalers[0]) == (precision == "fp16")


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), *AUTOCAST.items()])
def test_network_computes_in_its_precision_and_the_loss_in_float32(monkeypatch, precision, dtype):
    trainer, images, labels = trainer_and_batch(precision=precision)
    seen = {}
    trainer.model.encoder.layer1.register_forward_hook(
        lambda module, inputs, output: seen.update(network=output.dtype)
    )

    def loss(features, labels, **options):
        seen["loss"] = features.dtype
        return original(features, labels, **options)

    original = supcon_loss
    monkeypatch.setattr("methods.contrastive.supcon_loss", loss)
    trainer.step(images, labels, 0)
    assert seen == {"network": dtype, "loss": torch.float32}
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("temperature", "base"), [(0.1, 1.0), (0.5, 1.0), (0.1, 0.07)])
def test_base_temperature_scales_the_step(temperature, base):
    def moved(**options):
        trainer, images, labels = trainer_and_batch(
            temperature=temperature, weight_decay=0.0, learning_rate=1e-3, **options
        )
        before = [weight.detach().clone() for weight in trainer.model.parameters()]
        trainer.step(images, labels, 0)
        pairs = zip(trainer.model.parameters(), before)
        return torch.cat([(now - then).flatten() for now, then in pairs]).norm().item()

    scaled = moved(base_temperature=base)
    assert scaled == pytest.approx(temperature / base * moved(), rel=1e-3)


def test_overflow_of_fp16_skips_the_step_and_counts_it(tmp_path, monkeypatch, capsys):
    original = Trainer.loss
    scales, kept, steps = [], [], [*range(6)]

    def loss(trainer, *arguments):
        value, step = original(trainer, *arguments), steps.pop(0)
        scales.append(trainer.scaler.get_scale())
        kept.append(trainer.model.head[0].weight.detach().clone())
        return value + (0 * value).sqrt() if step in (1, 4) else value

    monkeypatch.setattr(Trainer, "loss", loss)
    run = pretrain(tmp_path, *SHORT, "--precision", "fp16")
    assert scales == [SCALE, SCALE, SCALE / 2, SCALE / 2, SCALE / 2, SCALE / 4]
    same = [torch.equal(before, after) for before, after in pairwise(kept)]
    assert same == [False, True, False, False, True]
    assert "epoch 1  steps skipped so far for an overflow of fp16: 2" in capsys.readouterr().out
    assert json.loads((run / "results.json").read_text())["skipped_steps"] == 2
    # The count goes on where the checkpoint has it.
    assert load_checkpoint(run / "step-4.pt")["state"]["skipped"] == 1
    steps += [4, 5]
    pretrain(tmp_path, *SHORT, "--precision", "fp16", "--resume", run / "step-4.pt")
    assert json.loads((run / "results.json").read_text())["skipped_steps"] == 2


def test_recorded_gradients_are_not_scaled():
    norms = []
    for precision in ("fp32", "fp16"):
        trainer, images, labels = trainer_and_batch(precision=precision)
        trainer.step(images, labels, 0)
        norms.append(trainer.gradient_norm.item())
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_and_filters_lie_as_asked(channels_last):
    trainer, images, _ = trainer_and_batch(channels_last=channels_last, width=16, dataset="digits")
    view = trainer.views.random(images.expand(-1, 3, -1, -1), step=0, view=0)
    filters = trainer.model.encoder.layer1[0].conv1.weight
    for tensor in (view, filters):
        assert tensor.is_contiguous(memory_format=trainer.views.memory_format)
        assert tensor.is_contiguous() != channels_last


def test_a_narrow_network_trains_on_images_of_64_pixels():
    # Of channels-last filters of 8 channels the backward has ended the process there.
    options = {"width": 8, "image_size": 64, "batch_size": 4, "dataset": "digits"}
    trainer, images, labels = trainer_and_batch(**options)
    assert trainer.views.memory_format == torch.contiguous_format
    trainer.step(images[:4], labels[:4], 0)
    assert trainer.gradient_norm.isfinite()


@pytest.mark.parametrize("options", [{}, {"queue_size": 128, "probe": True}], ids=["plain", "all"])
def test_compiled_trains_the_same_under_plain_names(monkeypatch, options):
    # Traced and differentiated as for real, without the minutes of a C++ compiler.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain, images, labels = trainer_and_batch(**options)
    compiled, _, _ = trainer_and_batch(compile=True, **options)
    assert compiled.network is not compiled.model
    losses = [[t.step(images, labels, n).item() for n in range(3)] for t in (plain, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    saved = compiled.state_dict()["model"]
    assert list(saved) == list(plain.state_dict()["model"])
    moved = saved["encoder.conv1.weight"] - plain.state_dict()["model"]["encoder.conv1.weight"]
    assert moved.abs().max() < 1e-3
    plain.load_state_dict(compiled.state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {"clip_grad": 1.0},
        {"num_views": 3, "queue_size": 256, "ema_decay": 0.9, "probe": True},
        {"num_views": 3, "method": "simclr", "probe": True},
        {"method": "joint", "learn_temperature": True},
    ],
    ids=["plain", "queue", "simclr", "joint"],
)
def test_chunks_train_as_the_whole_batch_does(options):
    (whole, images, labels), (chunked, *_) = (
        trainer_and_batch(**NO_STATISTICS, **options, **chunk)
        for chunk in ({}, {"grad_cache_chunk": 50})
    )
    begun = whole.model.head[0].weight.detach().clone()
    widths = set()
    chunked.model.register_forward_pre_hook(lambda module, views: widths.add(len(views[0])))
    losses = [[t.step(images, labels, n).item() for n in range(3)] for t in (whole, chunked)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    states = [{**t.state_dict(), "scaler": None, "optimizer": None} for t in (chunked, whole)]
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)
    assert (whole.model.head[0].weight - begun).abs().max() > 1e-3
    num_rows = 64 * (whole.method.num_embedded or whole.num_views)
    assert widths == {50, num_rows % 50}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_chunks_round_no_worse_than_the_whole_batch(precision):
    def gradient(**options):
        trainer, images, labels = trainer_and_batch(**NO_STATISTICS, **options)
        trainer.step(images, labels, 0)
        return torch.cat([weight.grad.flatten() for weight in trainer.model.parameters()])

    exact = gradient()
    whole, chunked = (gradient(precision=precision, grad_cache_chunk=chunk) for chunk in (None, 50))
    error = (whole - exact).norm()
    assert 0 < (chunked - exact).norm() < 1.5 * error < 0.1 * exact.norm()


def test_phases_of_a_step_by_chunks():
    trainer, images, labels = trainer_and_batch(grad_cache_chunk=50)
    trainer.clock.begin()
    trainer.step(images, labels, 0)
    assert [name for name, _ in trainer.clock.marks] == ["", *PHASES[:-1]]


def test_compiled_run_resumes_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr("supcon_kernels.small_stem.ResNet", SmallEncoder)
    options = (*SHORT, "--compile", "true", "--queue_size", 512)
    whole = pretrain(tmp_path / "whole", *options)
    other = pretrain(tmp_path / "other", *options)
    # A process that resumes compiles anew.
    torch.compiler.reset()
    resumed = pretrain(tmp_path / "other", *options, "--resume", other / "step-4.pt")
    assert metrics(resumed) == metrics(whole)
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())


@pytest.mark.parametrize("method", ["supcon", "simclr"])
def test_every_view_of_an_image_is_in_the_loss(monkeypatch, method):
    trainer, images, labels = trainer_and_batch(num_views=3, method=method)
    seen = []

    def spy(features, given, **options):
        seen.append((features, given))
        return supcon_loss(features, given, **options)

    monkeypatch.setattr("methods.contrastive.supcon_loss", spy)
    trainer.model.eval()
    before = copy.deepcopy(trainer.model)
    trainer.step(images, labels, 5)
    ((features, given),) = seen
    assert features.shape == (64, 3, 128)
    assert torch.equal(given, labels if method == "supcon" else 5 * 64 + torch.arange(64))
    for view in range(3):
        _, expected = before(trainer.views.random(images, step=5, view=view))
        assert torch.allclose(features[:, view], expected, atol=1e-5)
