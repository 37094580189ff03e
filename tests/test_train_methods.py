"""Each method: it learns digits, goes on exactly, and does what its paper says."""

import copy
import json
import sys
from dataclasses import replace
from itertools import chain, islice, repeat

import kornia
import pytest
import torch
import torch.nn.functional as F
import yaml

import train_fixtures  # noqa: F401  puts train/ on the path
from data.batches import training_batches
from evaluation.embeddings import encode_stored
from evaluation.knn import accuracy, knn_predict
from methods.cmc import Edges
from methods.n_pairs import sets_of_pairs
from methods.options import WITH_CLASSIFIER, WITHOUT_LABELS, MethodOptions
from run.errors import UserError
from run.processes import Ranks
from run.saved_run import open_run
from supcon_kernels import supcon_loss
from train_fixtures import TRAIN, metrics, pretrain
from train_parts import load_data, options_of, trainer_of
from training.build import METHODS, build_method

SMALL = {"model": "resnet10", "width": 4, "image_size": 8, "warmup_epochs": 0, "batch_size": 64}
OPTIONS = {
    "supcon": {"learn_temperature": True, "denominator": "one_positive"},
    "moco": {"queue_size": 512, "queue_momentum": 0.9},
    "cross_entropy": {"label_smoothing": 0.1},
    "cmc": {"temperature": 0.3, "learning_rate": 0.4},
}
NUM_STEPS, RESUMED_AT = 48, 44
# scipy calls NumPy in a way that it no longer wants.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")


@pytest.fixture(scope="module")
def digits():
    return load_data(options_of(**SMALL))


def trainer_for(method, digits, **options):
    config = options_of(**SMALL, method=method, **OPTIONS.get(method, {}) | options)
    assert not config.mistakes()
    return trainer_of(config, digits, steps_per_epoch=NUM_STEPS // 3)


def first_batch(digits):
    return digits.train.images[:64], digits.train.labels[:64]


def train(trainer, batches, *, first=0):
    return [trainer.step(*batch, step).item() for step, batch in enumerate(batches, start=first)]


@torch.no_grad()
def accuracies(trainer, digits):
    """By k-NN, and by the classifier of the method where it has one."""
    trainer.model.eval()
    test, bank = (
        encode_stored(trainer.model, trainer.views, split.images)
        for split in (digits.test, digits.train)
    )
    found = [knn_predict(test, bank, digits.train.labels, num_classes=10)]
    if trainer.method.classifier is not None:
        found.append(trainer.method.classifier(test).argmax(1))
    return [accuracy(predicted, digits.test.labels) for predicted in found]


@pytest.mark.parametrize("method", METHODS)
def test_it_learns_digits_and_goes_on_exactly(method, digits):
    trainer = trainer_for(method, digits)
    _, batches = training_batches(digits.train, options_of(**SMALL).batches, seed=0)
    batches = list(islice(chain.from_iterable(repeat(batches)), NUM_STEPS))
    train(trainer, batches[:RESUMED_AT])
    saved = copy.deepcopy(trainer.state_dict())
    losses = train(trainer, batches[RESUMED_AT:], first=RESUMED_AT)

    # The untrained network has 0.31 by k-NN, an untrained classifier 0.10.
    found = accuracies(trainer, digits)
    assert len(found) == (2 if method in WITH_CLASSIFIER else 1)
    assert found[0] > 0.45 and found[-1] > 0.25

    assert trainer.method.uses_labels == (method not in WITHOUT_LABELS)
    other = trainer_for(method, digits)
    other.load_state_dict(saved)
    assert train(other, batches[RESUMED_AT:], first=RESUMED_AT) == losses
    for part in ("model", "method"):
        expected = trainer.state_dict()[part]
        torch.testing.assert_close(other.state_dict()[part], expected, rtol=0, atol=0)


def test_weights_of_a_method_are_drawn_alike_and_leave_the_random_state(digits, monkeypatch):
    states, weights = [], []
    for method, seed in (("supcon", 0), ("cross_entropy", 0), ("joint", 0), ("joint", 1)):
        trainer = trainer_for(method, digits, seed=seed)
        states.append(torch.get_rng_state())
        weights.append(getattr(trainer.method.classifier, "weight", None))
    assert torch.equal(states[0], states[1])
    assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[2], weights[3])
    # What the network draws on a GPU stays that of each process.
    config, seeded = options_of(**SMALL, method="joint"), []
    model = trainer_of(config, digits).model
    monkeypatch.setattr("torch.cuda.manual_seed_all", seeded.append)
    build_method(config, model, digits)
    assert not seeded


def test_joint_is_the_sum_and_trains_one_network(digits):
    trainer = trainer_for("joint", digits, contrast_weight=0.3, temperature=0.2)
    embedded, projected = torch.randn(128, 32), torch.randn(128, 128)
    labels = first_batch(digits)[1]
    loss = trainer.method(embedded, projected, labels)
    scores = trainer.method.classifier(embedded)
    views = projected.unflatten(0, (2, 64)).transpose(0, 1)
    contrast = supcon_loss(views, labels, temperature=0.2)
    torch.testing.assert_close(loss, F.cross_entropy(scores, labels.repeat(2)) + 0.3 * contrast)


def test_temperature_is_learned_from_the_one_given(digits):
    trainer = trainer_for("supcon", digits, temperature=0.3, denominator="all")
    assert trainer.method.temperature.item() == pytest.approx(0.3)
    trainer.step(*first_batch(digits), 0)
    assert abs(trainer.method.temperature.item() - 0.3) > 1e-4
    with torch.no_grad():
        trainer.method.log_change.fill_(-99)
    assert trainer.method.temperature.item() == pytest.approx(0.01)


@pytest.mark.parametrize(
    "options", [{"summation": "in"}, {"denominator": "only_negatives"}], ids=lambda one: str(one)
)
def test_variants_reach_the_loss(digits, options):
    config = options_of(**SMALL, **options)
    method = trainer_of(config, digits).method
    projected, labels = torch.randn(128, 128), first_batch(digits)[1]
    views = projected.unflatten(0, (2, 64)).transpose(0, 1)
    expected = supcon_loss(views, labels, temperature=0.1, **options)
    torch.testing.assert_close(method(torch.empty(0), projected, labels), expected)
    # Only with all in the denominator is the loss of a collapse known.
    assert (method.collapsed_loss is None) == ("denominator" in options)


@pytest.mark.parametrize(
    ("num_views", "max_positives", "others"), [(2, 1, 0), (2, 3, 1), (3, 8, 2)]
)
def test_surplus_positives_leave_the_denominator(digits, num_views, max_positives, others):
    """By the formula, pair by pair; a class of three images, one of one, one of two."""
    limits = {"num_views": num_views, "max_positives": max_positives, "temperature": 0.5}
    method = trainer_of(options_of(**SMALL, **limits), digits).method
    labels, rows = torch.tensor([4, 7, 4, 1, 4, 1]), torch.randn(num_views * 6, 8)
    found = method(torch.empty(0), rows, labels)

    images, near = list(range(6)) * num_views, F.normalize(rows.double(), dim=1)
    similar, losses = (near @ near.T / 0.5).exp(), []
    for i, image in enumerate(images):
        of_class = [k for k in range(6) if k != image and labels[k] == labels[image]]
        kept = {image, *of_class[:others]}
        positives = [j for j, other in enumerate(images) if j != i and other in kept]
        assert len(positives) <= max_positives
        negatives = [j for j, other in enumerate(images) if labels[other] != labels[image]]
        log_p = (similar[i, positives] / similar[i, positives + negatives].sum()).log()
        losses.append(-log_p.mean())
    torch.testing.assert_close(found, torch.stack(losses).mean().float())
    assert method.collapsed_loss is None


def test_limited_positives_need_one_process(digits):
    options = options_of(**SMALL, max_positives=3)
    with pytest.raises(UserError, match="--max_positives needs one process"):
        build_method(options, trainer_of(options, digits).model, digits, Ranks(0, 2))


def test_pairs_use_each_view_once():
    labels = torch.tensor([2, 0, 2, 1, 2, 0, 2, 2, 0])
    sets = [chosen.tolist() for chosen in sets_of_pairs(labels)]
    assert sets == [[1, 5, 3, 0, 2], [8, 4, 6]]
    assert [chosen.tolist() for chosen in sets_of_pairs(torch.tensor([4, 3]))] == [[1, 0]]


def coloured(data):
    colours = torch.randint(256, data.train.images.shape, dtype=torch.uint8)
    return replace(data, train=replace(data.train, images=colours))


@pytest.mark.parametrize(("channels", "seen", "num_views"), [(1, 1, 1), (3, 2, 1), (1, 1, 2)])
def test_cmc_sees_two_kinds_with_two_encoders(digits, channels, seen, num_views):
    config = options_of(
        **SMALL, method="cmc", in_chans=channels, augment="simclr", num_views=num_views
    )
    data = load_data(config)
    if channels == 3:
        with pytest.raises(UserError, match=r"those of digits are grey: --in_chans 1"):
            trainer_of(config, data)
        data = coloured(data)
    trainer = trainer_of(config, data)
    views = []
    trainer.method.second.register_forward_pre_hook(lambda module, given: views.append(given[0]))
    trainer.model.register_forward_pre_hook(lambda module, given: views.append(given[0]))
    before = copy.deepcopy(trainer.method.second.state_dict())
    loss = trainer.step(*first_batch(data), 0)
    other, own = views
    assert other.shape == (64, seen, 8, 8) and own.shape == (64, channels, 8, 8)
    assert torch.equal(other, trainer.method.kind(own)) == (num_views == 1)
    assert loss.isfinite()
    moved = trainer.method.second.encoder.conv1.weight - before["encoder.conv1.weight"]
    assert moved.abs().max() > 1e-4


def test_colours_do_not_know_lightness(digits):
    config = options_of(**SMALL, method="cmc", in_chans=3, mean=[0.2] * 3, std=[0.5] * 3)
    colours = trainer_of(config, coloured(load_data(config))).method.kind
    grey = torch.rand(2, 1, 8, 8).expand(-1, 3, -1, -1)
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert colours((grey - 0.2) / 0.5).abs().max() < 1e-3
    blueness, redness = colours((red - 0.2) / 0.5).unbind(1)
    assert blueness.max() < -0.3 and redness.min() > 0.9


def test_edges_are_sobels():
    images = torch.randn(2, 1, 9, 9)
    expected = kornia.filters.sobel(images, eps=0)
    torch.testing.assert_close(Edges()(images), expected)


def test_views_of_an_image_are_as_many_as_the_method_needs():
    counts = {name: options_of(method=name).num_views for name in METHODS}
    assert [name for name, count in counts.items() if count == 1] == [
        "cross_entropy", "max_margin",
    ]  # fmt: skip
    assert set(counts.values()) == {1, 2}
    assert options_of(method="cross_entropy", num_views=3).num_views == 3


def test_every_method_is_an_option_and_has_a_recipe():
    choices = set(MethodOptions.__annotations__["method"].__args__)
    assert choices == set(METHODS)
    recipes = [yaml.safe_load(path.read_text()) for path in (TRAIN / "recipes").glob("*.yaml")]
    assert {recipe["method"] for recipe in recipes} == choices


def test_library_that_is_missing_is_named(digits, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning", None)
    for name in [name for name in sys.modules if name.startswith("pytorch_metric_learning.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=r"--method triplet needs pytorch-metric-learning: pip"):
        trainer_for("triplet", digits)


def test_run_of_simclr_with_a_queue_is_one_of_moco(tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.draw", lambda *arguments: None)
    learned = "--learn_temperature"
    run = pretrain(tmp_path, "--max_steps", 1, "--method", "moco", "--queue_size", 128, learned)
    assert json.loads((run / "results.json").read_text())["temperature"] != pytest.approx(0.1)
    saved = torch.load(run / "last.pt", weights_only=True)
    saved["config"]["method"] = "simclr"
    torch.save(saved, run / "old.pt")
    assert open_run(run / "old.pt").options.method.method == "moco"

    # Its config.yaml resumes it.
    config = (run / "config.yaml").read_text()
    assert "method: moco\n" in config
    (tmp_path / "old.yaml").write_text(config.replace("method: moco\n", "method: simclr\n"))
    (run / "old.pt").rename(run / "last.pt")
    more = ("--max_steps", 2, "--resume", run)
    assert metrics(pretrain(tmp_path, "--config", tmp_path / "old.yaml", *more))[-1]["step"] == "2"
