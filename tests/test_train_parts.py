"""The parts of a run by themselves: k-NN, views, learning rates, the networks, tables."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import train_fixtures  # noqa: F401  puts train/ on the path
from evaluation.embeddings import Share
from evaluation.knn import _from_keys, accuracy, knn_predict, nearest
from run.checkpoint import RunState
from run.errors import UserError
from run.records import Table
from train_parts import build_model, build_views, load_data, options_of
from training.optimizer import build_optimizer, load_optimizer
from training.schedule import build_schedule


def unit(degrees):
    return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]


def test_knn_weighs_votes_as_computed_by_hand():
    # One neighbour at 0 degrees of class 0 against two at 30 of class 1: exp(1 / t) against
    # 2 exp(0.866 / t). At t = 0.07 the near one weighs 3.4 times the two; at t = 1 they win.
    bank = torch.tensor([unit(0), unit(30), unit(-30), unit(170)])
    labels = torch.tensor([0, 1, 1, 2])
    query = torch.tensor([unit(0)])
    predict = partial(knn_predict, query, bank, labels, num_classes=3)
    assert math.exp(1 / 0.07) > 2 * math.exp(math.cos(math.pi / 6) / 0.07)
    assert predict() == 0
    assert predict(temperature=1.0) == 1
    assert predict(neighbours=1, temperature=1.0) == 0


def test_knn_compares_directions_in_any_chunking(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(50, 8, generator=generator)
    labels = torch.randint(5, (50,), generator=generator)
    queries = torch.randn(7, 8, generator=generator)
    expected = knn_predict(queries, bank, labels, num_classes=5)
    scaled = torch.rand(50, 1, generator=generator) + 0.1
    monkeypatch.setattr("evaluation.knn.CHUNK", 3)
    assert torch.equal(knn_predict(100 * queries, scaled * bank, labels, num_classes=5), expected)
    own = knn_predict(bank, bank, labels, num_classes=5, neighbours=1)
    assert torch.equal(own, labels)


def test_knn_by_blocks_finds_the_nearest_of_all():
    generator = torch.Generator().manual_seed(1)
    bank, queries = (torch.randn(n, 6, generator=generator) for n in (1200, 30))
    labels = torch.arange(1200)
    directions = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    similarity, number = (directions[1] @ directions[0].T).topk(700)
    found, of = _from_keys(nearest(queries, Share(bank), 700))
    torch.testing.assert_close(found, similarity)
    assert (of == number).float().mean() > 0.99 and found.min() < 0
    own = knn_predict(queries, bank, labels, num_classes=1200, neighbours=1)
    assert torch.equal(own, number[:, 0])


def test_accuracy_counts_samples_not_classes():
    predictions = torch.tensor([0, 0, 0, 1])
    assert accuracy(predictions, torch.tensor([0, 0, 1, 1])) == 0.75
    assert accuracy(predictions, torch.tensor([0, 0, 0, 0])) == 0.75


def test_accuracy_is_not_rounded_to_float32():
    assert accuracy(torch.arange(50) // 31, torch.zeros(50, dtype=torch.long)) == 0.62


COLOURFUL = ["autoaugment", "randaugment", "stacked_randaugment"]


def views_and_images(**options):
    """The views of a config, and 32 images: digits, in colours for those that need them."""
    config = options_of(**options)
    data = load_data(config)
    if config.views.augment not in COLOURFUL:
        return build_views(config, data), data.train.images[:32]
    images = (data.train.images[:32] * torch.tensor([1.0, 0.7, 0.3]).view(-1, 1, 1)).byte()
    mean, std = data.mean * 3, data.std * 3
    data = replace(data, train=replace(data.train, images=images), channels=3, mean=mean, std=std)
    return build_views(config, data), images


@pytest.mark.parametrize("augment", ["digits", "crop_flip", "simclr", "simclr_blur", *COLOURFUL])
def test_views_are_functions_of_seed_step_and_view(augment):
    views, images = views_and_images(augment=augment)
    view = views.random(images, step=3, view=0)
    torch.manual_seed(123)
    assert torch.equal(views.random(images, step=3, view=0), view)
    assert not torch.equal(views.random(images, step=4, view=0), view)
    assert not torch.equal(views.random(images, step=3, view=1), view)
    other, _ = views_and_images(augment=augment, seed=1)
    assert not torch.equal(other.random(images, step=3, view=0), view)


def test_views_leave_the_random_state_alone():
    views, images = views_and_images()
    before = torch.get_rng_state()
    views.random(images, step=0, view=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("augment", ["digits", "crop_flip", "simclr", "simclr_blur", *COLOURFUL])
def test_views_differ_from_image_to_image(augment):
    views, images = views_and_images(augment=augment)
    view = views.random(images[:1].expand(8, -1, -1, -1), step=0, view=0)
    assert len({tuple(image.flatten().tolist()) for image in view}) == 8


@pytest.mark.parametrize("augment", ["autoaugment", "randaugment"])
def test_policies_draw_their_changes_for_each_image_alone(augment):
    # Without the crop: a change drawn for the batch would leave a few versions of one image.
    views, images = views_and_images(augment=augment)
    policy = views.pipeline[2:]
    images = images[:1].expand(100, -1, -1, -1) / 255
    torch.manual_seed(0)
    changed = policy(images)
    assert changed.shape == images.shape and changed.min() >= 0 and changed.max() <= 1
    assert len({tuple(image.flatten().tolist()) for image in changed}) > 25


@pytest.mark.parametrize("augment", COLOURFUL)
def test_grey_images_are_refused_where_colours_change(augment):
    config = options_of(augment=augment)
    with pytest.raises(UserError, match=f"--augment {augment} .*digits are grey: --augment simclr"):
        build_views(config, load_data(config))


def test_blur_takes_detail_from_half_of_the_views():
    def detail(augment):
        views, images = views_and_images(augment=augment, seed=3)
        views.pipeline = views.pipeline[-1:] if augment == "simclr_blur" else torch.nn.Identity()
        view = views.random(images, step=0, view=0)
        return (view[..., 1:] - view[..., :-1]).abs().mean((1, 2, 3))

    blurred = detail("simclr_blur") < 0.9 * detail("simclr")
    assert 8 <= blurred.sum() <= 24


def test_plain_view_is_normalized_by_the_training_images():
    config = options_of()
    data = load_data(config)
    plain = build_views(config, data).plain(data.train.images)
    assert plain.mean().item() == pytest.approx(0, abs=1e-4)
    assert plain.std().item() == pytest.approx(1, abs=1e-3)


def test_digits_are_never_flipped():
    # Mean over many views of one digit keeps its handedness: closer to it than to its mirror.
    views, images = views_and_images()
    for image in images[:5]:
        mean = views.random(image.expand(64, -1, -1, -1), step=0, view=0).mean(0)
        plain = views.plain(image[None])[0]
        assert (mean - plain).norm() < (mean - plain.flip(-1)).norm()


COSINE = [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({"schedule": "cosine"}, COSINE),
        ({"final_learning_rate": 0.1}, [0.1 + 0.9 * rate for rate in COSINE]),
        # After epochs 1.5 and 2, that is from the seventh and the ninth step on.
        (
            {"schedule": "step", "decay_epochs": [1.5, 2], "decay_rate": 0.5},
            [1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25],
        ),
        # Half after each half epoch of four steps.
        (
            {"schedule": "exponential", "decay_epochs": [0.5], "decay_rate": 0.25},
            [1, 0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125],
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("start", [0, 2, 7])
def test_learning_rates_follow_the_written_list(options, rates, start):
    # Wherever a run goes on: the step alone decides.
    config = options_of(learning_rate=1.0, warmup_epochs=1, epochs=3, **options)
    assert not config.mistakes()
    optimizer = build_optimizer(config.optimizer, torch.nn.Linear(2, 2))
    schedule = build_schedule(config.schedule, optimizer, steps_per_epoch=4)
    seen = []
    for step in range(start, 12):
        schedule.step_update(step)
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen == pytest.approx([0.2, 0.4, 0.6, 0.8, *rates][start:])


def test_schedule_of_one_step_is_at_the_peak_without_a_warning(caplog):
    config = options_of(learning_rate=1.0, max_steps=1)
    optimizer = build_optimizer(config.optimizer, torch.nn.Linear(2, 2))
    build_schedule(config.schedule, optimizer, steps_per_epoch=4).step_update(0)
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert not caplog.records


RMSPROP = {"momentum": 0.9, "alpha": 0.9, "eps": 1.0}


@pytest.mark.parametrize(
    ("optimizer", "kind", "expected"),
    [
        ("momentum", "SGD", {"momentum": 0.9, "nesterov": False}),
        ("nesterov", "SGD", {"momentum": 0.9, "nesterov": True}),
        ("lars", "Lars", {"momentum": 0.9, "nesterov": False, "trust_coeff": 0.001}),
        ("rmsprop", "RMSpropTF", RMSPROP),
        ("adamw", "AdamW", {"betas": (0.9, 0.999)}),
    ],
)
@pytest.mark.parametrize("decay_norm_and_bias", [None, True, False, "bias"])
def test_parameter_groups(optimizer, kind, expected, decay_norm_and_bias):
    config = options_of(
        optimizer=optimizer,
        decay_norm_and_bias=decay_norm_and_bias,
        weight_decay=0.1,
        learning_rate=0.5,
    )
    network = build_model(config, channels=1)
    built = build_optimizer(config.optimizer, network)
    assert type(built).__name__ == kind
    for group in built.param_groups:
        assert {key: group[key] for key in expected} == expected
        assert group["lr"] == 0.5

    split = decay_norm_and_bias in (False, "bias")
    split = split or (decay_norm_and_bias is None and optimizer == "lars")
    spared = {
        id(parameter)
        for module in network.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if (name == "bias" and decay_norm_and_bias != "bias")
        or isinstance(module, torch.nn.BatchNorm2d)
    }
    everything = {id(parameter) for parameter in network.parameters()}
    decays = {
        group["weight_decay"]: {id(parameter) for parameter in group["params"]}
        for group in built.param_groups
    }
    if split:
        assert decays == {0.1: everything - spared, 0.0: spared}
    else:
        assert decays == {0.1: everything}


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_lars_adapts_weights_and_leaves_biases_alone(weight_decay):
    config = options_of(optimizer="lars", weight_decay=weight_decay, learning_rate=2.0)
    layer = torch.nn.Linear(3, 2)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    optimizer = build_optimizer(config.optimizer, layer)
    layer(torch.arange(6.0).view(2, 3)).square().sum().backward()
    # Some versions of timm change the gradient itself.
    gradient, bias_gradient = layer.weight.grad.clone(), layer.bias.grad.clone()
    optimizer.step()
    decayed = gradient + weight_decay * weight
    trust = 0.001 * weight.norm() / (gradient.norm() + weight_decay * weight.norm())
    torch.testing.assert_close(layer.weight.detach(), weight - 2.0 * trust * decayed)
    torch.testing.assert_close(layer.bias.detach(), bias - 2.0 * bias_gradient)


def test_rmsprop_resumed_keeps_the_eps_that_it_had():
    # Of a checkpoint from before it was 1.
    layer = torch.nn.Linear(2, 2)
    config = options_of(optimizer="rmsprop")
    saved = build_optimizer(config.optimizer, layer).state_dict()
    saved["param_groups"][0]["eps"] = 1e-3
    resumed = build_optimizer(config.optimizer, layer)
    load_optimizer(resumed, saved)
    assert resumed.param_groups[0]["eps"] == 1e-3


@pytest.mark.parametrize("stem", ["small", "standard"])
@pytest.mark.parametrize("zero", [True, False])
def test_residual_blocks_begin_as_asked(stem, zero):
    config = options_of(model="resnet18", stem=stem, zero_init_residual=zero)
    encoder = build_model(config, channels=3).encoder
    for name, weight in encoder.named_parameters():
        if ".bn2.weight" in name:
            assert torch.equal(weight, torch.full_like(weight, 0.0 if zero else 1.0))


def test_residual_blocks_that_a_model_lacks_are_named():
    config = options_of(model="test_vit", stem="standard", zero_init_residual=False)
    with pytest.raises(UserError, match=r"--no_zero_init_residual: --model test_vit has no such"):
        build_model(config, channels=3)


def test_small_stem_keeps_the_resolution():
    config = options_of(model="resnet10", width=4)
    encoder = build_model(config, channels=1).encoder
    images = torch.zeros(2, 1, 16, 16)
    assert encoder.layer1(encoder.maxpool(encoder.conv1(images))).shape == (2, 4, 16, 16)
    assert encoder(images).shape == (2, 32)
    embedded, projected = build_model(config, channels=1)(images)
    assert embedded.shape == (2, 32) and projected.shape == (2, 128)


def test_standard_stem_takes_any_model_of_timm():
    config = options_of(model="resnet10t", stem="standard")
    embedded, projected = build_model(config, channels=3)(torch.zeros(2, 3, 32, 32))
    assert embedded.shape == (2, 512) and projected.shape == (2, 128)


@pytest.mark.parametrize(("stem", "model"), [("small", "vit"), ("standard", "resnet1000")])
def test_unknown_model_is_named(stem, model):
    with pytest.raises(UserError, match=f"--model {model}"):
        build_model(options_of(stem=stem, model=model), channels=3)


def test_table_is_cut_back_to_the_step(tmp_path):
    path = tmp_path / "metrics.csv"
    columns = ("step", "epoch", "loss", "knn_accuracy")
    table = Table(path, columns, resumed=None)
    for step in range(1, 5):
        table.add(step=step, epoch=(step + 1) // 2, loss=1 / 3)
        if step % 2 == 0:
            table.add(step=step, epoch=step // 2, knn_accuracy=0.5)
    table.file.close()
    written = path.read_text().splitlines(keepends=True)
    at = partial(RunState, raw_pixels=0.0, untrained=0.0, accuracy=0.0)
    # After step 4 and its epoch's evaluation; before that evaluation; after step 3; after epoch 1.
    for state, rows in (
        (at(epoch=2, step=4), 6),
        (at(epoch=1, step=4), 5),
        (at(epoch=1, step=3), 4),
        (at(epoch=1, step=2), 3),
    ):
        Table(path, columns, resumed=state).file.close()
        assert path.read_text() == "".join(written[: 1 + rows])
    # An older version wrote fewer columns.
    Table(
        path, (*columns[:3], "gradient_norm", columns[3]), resumed=at(epoch=1, step=2)
    ).file.close()
    assert path.read_text().splitlines()[1:] == [
        "1,1,0.333333333,,",
        "2,1,0.333333333,,",
        "2,1,,,0.5",
    ]
    # Died while it wrote 12: what is there reads as 1.
    path.write_text("".join(written[:4]) + "1")
    Table(path, columns, resumed=at(epoch=1, step=2)).file.close()
    assert path.read_text() == "".join(written[:4])
