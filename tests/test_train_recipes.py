"""The recipes: each is read, can be built, and has the numbers that were published for it."""

import re
from dataclasses import asdict

import pytest
import torch
import yaml

import train_fixtures  # noqa: F401  puts train/ on the path
from data.images import ImageData, Split
from linear_stage.options import LinearOptions
from run.command_line import parse
from run.options import PretrainOptions
from train_fixtures import TRAIN
from train_parts import build_model, build_views, options_of
from training.optimizer import build_optimizer
from training.schedule import build_schedule

RECIPES = {path.stem: path for path in sorted((TRAIN / "recipes").glob("*.yaml"))}
# Of those that repeat a published run: its learning rate for a batch of 256, and its batch.
PUBLISHED = {
    "cifar10": (0.125, 1024),
    "cifar10_simclr": (0.125, 1024),
    "cifar10_cross_entropy": (0.2, 1024),
    "cifar10_tpu": (0.5, 4096),
    "imagenet_rn50": (0.4, 6144),
    "imagenet_rn200": (0.2, 4096),
    "imagenet_rn50_memory": (0.03, 256),
    "imagenet_moco": (0.03, 256),
}
WITHOUT_LINEAR_STAGE = {"imagenet_rn50_memory", "cifar10_cross_entropy"}
OURS = {
    "digits", "fashion_mnist",
    "digits_cmc", "digits_joint", "digits_max_margin", "digits_n_pairs", "digits_triplet",
}  # fmt: skip


def read(name):
    return parse(PretrainOptions, ["--config", str(RECIPES[name])], prog="pretrain", description="")


def stand_in(config):
    """Four images like those of a recipe's data set, in its place."""
    grey = config.data.dataset in ("digits", "fashion_mnist")
    channels, size = (1 if grey else 3), config.data.image_size or 32
    split = Split(torch.zeros(4, channels, size, size, dtype=torch.uint8), torch.arange(4) % 2)
    half = [0.5] * channels
    name = config.data.dataset
    return ImageData(split, split, ["a", "b"], size, channels, half, half, name=name)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_read_and_built(name):
    config = read(name)
    for option, value in yaml.safe_load(RECIPES[name].read_text()).items():
        assert config.flat()[option] == value
    kind = next(kind for kind in ("cifar10", "imagenet", "digits", "fashion_mnist") if kind in name)
    assert config.data.dataset == (f"imagefolder:{kind}" if kind == "imagenet" else kind)

    data = stand_in(config)
    view = build_views(config, data).random(data.train.images, step=0, view=0)
    assert view.shape == data.train.images.shape
    # Without memory for its weights, nor the time to draw them.
    with torch.device("meta"):
        model = build_model(config, channels=data.channels)
    optimizer = build_optimizer(config.optimizer, model)
    schedule = build_schedule(config.schedule, optimizer, steps_per_epoch=10)
    rates = []
    for step in range(10 * config.schedule.epochs):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert max(rates) == rates[10 * config.schedule.warmup] == config.optimizer.learning_rate
    end = config.schedule.final_learning_rate
    assert end < rates[-1] < end + 1e-3 * config.optimizer.learning_rate


def test_every_recipe_is_ours_or_published():
    assert RECIPES.keys() == OURS | PUBLISHED.keys()


def test_recipe_that_says_its_temperature_says_what_the_loss_is_scaled_by():
    for path in RECIPES.values():
        recipe = yaml.safe_load(path.read_text())
        assert ("temperature" in recipe) == ("base_temperature" in recipe), path


@pytest.mark.parametrize("name", PUBLISHED)
def test_learning_rate_follows_the_published_rule(name):
    config = read(name)
    rate, batch_size = PUBLISHED[name]
    assert config.batches.batch_size == batch_size
    assert config.optimizer.learning_rate == pytest.approx(rate * batch_size / 256)


def tables():
    """The tables of docs/recipes.md: of each the recipes at its head, and their cells by option."""
    text = (TRAIN.parent / "docs/recipes.md").read_text()
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = (
            [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()
        )
        names = [re.search(r"`(\w+)`", cell) for cell in head[1:]]
        yield [name and name[1] for name in names], {row[0].strip("`"): row[1:] for row in rows}


def check_table(names, rows, configs):
    for option, cells in rows.items():
        for name, config, cell in zip(names, configs, cells):
            if cell != "–":  # their code has no such thing
                assert config[option] == yaml.safe_load(cell), (option, name)


def test_recipes_have_what_the_table_says():
    names, rows = next(tables())
    configs = [(read(name) if name else options_of()).flat() for name in names]
    for config in configs:
        if config["decay_norm_and_bias"] is None:
            config["decay_norm_and_bias"] = config["optimizer"] != "lars"
    check_table(names, rows, configs)
    # Nothing that makes the network is said in a recipe alone.
    own = {"dataset", "method", "width", "workers", "knn_every", "knn_bank", "save_every"}
    own |= {"label_smoothing"}
    own |= {"grad_cache_chunk"}  # of which docs/recipes.md says what it changes
    for name in PUBLISHED.keys() - {"imagenet_rn50_memory", "imagenet_moco"}:
        assert yaml.safe_load(RECIPES[name].read_text()).keys() - own <= rows.keys()


def read_linear(name):
    argv = ["--checkpoint", "x", "--protocol", "paper"]
    if name is not None:
        argv += ["--config", str(TRAIN / f"recipes/linear/{name}.yaml")]
    options = parse(LinearOptions, argv, prog="linear", description="")
    flat = {name: value for room in asdict(options).values() for name, value in room.items()}
    [flat["weight_decay"]] = options.stage.weight_decays
    return flat


def test_linear_recipes_have_what_the_table_says():
    _, (names, rows) = tables()
    check_table(names, rows, [read_linear(name) for name in names])
    recipes = {path.stem: path for path in (TRAIN / "recipes/linear").glob("*.yaml")}
    assert recipes.keys() == PUBLISHED.keys() - WITHOUT_LINEAR_STAGE == set(names) - {None}
    for name, path in recipes.items():
        recipe = yaml.safe_load(path.read_text())
        assert recipe.pop("protocol") == "paper" and recipe.keys() - {"workers"} <= rows.keys()
        assert f"recipes/linear/{name}.yaml" in RECIPES[name].read_text()


def test_digits_recipe_is_the_default():
    assert read("digits") == options_of(augment="digits")
