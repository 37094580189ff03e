"""The memory variant: what its queue holds, what its queries are contrasted with, what moves."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import train_fixtures  # noqa: F401  puts train/ on the path
from supcon_kernels import supcon_loss
from train_fixtures import metrics, pretrain, weights
from train_parts import load_data, options_of, trainer_of

BATCH, VIEWS, SIZE = 32, 3, 160
NUM_KEYS = BATCH * (VIEWS - 1)


def trainer_and_batches(**options):
    """A trainer with a queue of two and a half steps, and four batches of digits."""
    config = options_of(
        model="resnet10", width=4, image_size=8, warmup_epochs=0, device="cpu",
        batch_size=BATCH, num_views=VIEWS, queue_size=SIZE, queue_momentum=0.9, **options,
    )  # fmt: skip
    assert not config.mistakes()
    data = load_data(config)
    trainer = trainer_of(config, data)
    return trainer, list(zip(data.train.images.split(BATCH), data.train.labels.split(BATCH)))[:4]


@pytest.mark.parametrize("method", ["supcon", "moco"])
def test_loss_is_the_formula_over_the_last_keys(method):
    trainer, batches = trainer_and_batches(method=method)
    keys = torch.empty(0, 128)
    classes = torch.empty(0, dtype=torch.long)
    for step, (images, labels) in enumerate(batches):
        network, average = copy.deepcopy((trainer.model, trainer.method.encoder.average.module))
        seen = [trainer.views.random(images, step=step, view=view) for view in range(VIEWS)]
        own = labels if method == "supcon" else torch.arange(step * BATCH, (step + 1) * BATCH)
        with torch.no_grad():
            queries = F.normalize(network(seen[0])[1])
            new = average(torch.cat(seen[1:]))[1]
        keys = torch.cat([keys, F.normalize(new)])[-SIZE:]
        classes = torch.cat([classes, own, own])[-SIZE:]
        log_share = (queries @ keys.T / 0.1).log_softmax(1)
        positive = own[:, None] == classes
        expected = -((log_share * positive).sum(1) / positive.sum(1)).mean()
        assert trainer.step(images, labels, step).item() == pytest.approx(expected.item(), rel=1e-4)

        if method == "moco":
            assert positive.sum(1).tolist() == [VIEWS - 1] * BATCH
        filled = trainer.method.queue.labels != -100
        assert filled.sum() == len(classes) == min((step + 1) * NUM_KEYS, SIZE)
        assert torch.equal(trainer.method.queue.labels[filled], classes)


def test_keys_come_without_gradient_from_an_average_that_follows_each_step():
    trainer, batches = trainer_and_batches()
    assert torch.equal(
        trainer.method.encoder.average.module.head[0].weight, trainer.model.head[0].weight
    )
    for step, (images, labels) in enumerate(batches):
        before = copy.deepcopy(trainer.method.encoder.average.module)
        trainer.step(images, labels, step)
        after = trainer.method.encoder.average.module
        assert after.training
        assert all(weight.grad is None for weight in after.parameters())
        for old, new, trained in zip(
            before.parameters(), after.parameters(), trainer.model.parameters()
        ):
            torch.testing.assert_close(new, 0.9 * old + 0.1 * trained)
    assert not torch.equal(after.head[0].weight, trainer.model.head[0].weight)


def test_average_begins_with_the_weights_that_a_run_begins_with():
    trainer, _ = trainer_and_batches()
    torch.nn.init.ones_(trainer.model.head[0].weight)
    trainer.restart_averages()
    assert torch.equal(
        trainer.method.encoder.average.module.head[0].weight, trainer.model.head[0].weight
    )


def test_trained_encoder_is_exported_not_that_of_the_keys(tmp_path):
    run = pretrain(tmp_path, "--max_steps", 2, "--queue_size", 128)
    exported = load_file(run / "encoder.safetensors")
    trained = weights(run)
    assert all(torch.equal(value, trained[f"encoder.{name}"]) for name, value in exported.items())
    saved = torch.load(run / "last.pt", weights_only=True)["method"]
    keys = saved["encoder.average.module.encoder.conv1.weight"]
    assert not torch.equal(keys, trained["encoder.conv1.weight"])


def test_collapse_onto_a_queue_is_named_once_it_is_full(tmp_path, monkeypatch, capsys):
    def collapsed(features, labels, *, contrast_features, **options):
        # The keys are those of a network that embeds alike, too; no slope leads out.
        alike = torch.ones_like(features) + 0 * features
        return supcon_loss(
            alike, labels, contrast_features=torch.ones_like(contrast_features), **options
        )

    monkeypatch.setattr("methods.contrastive.supcon_loss", collapsed)
    run = pretrain(tmp_path, "--batch_size", 256, "--epochs", 5, "--queue_size", 700)
    losses = [float(row["loss"]) for row in metrics(run) if row["loss"]]
    assert losses[:3] == pytest.approx([math.log(m) for m in (256, 512, 700)], abs=1e-4)
    warning = f"warning: the loss has stayed at {math.log(700):.4f} for 20 steps up to 22"
    assert capsys.readouterr().out.count(warning) == 1
