"""What a call means, where a comparison of backends cannot tell: both could be wrong alike."""

from __future__ import annotations

import math

import pytest
import torch

from cases import BACKENDS, NOWHERE, by_id, takes
from supcon_kernels import ClipLoss, SupConLoss, supcon_loss

backends = pytest.mark.parametrize("backend", BACKENDS)


def features_of(name):
    arguments = by_id(name).arguments()
    return arguments["features"], arguments.get("labels")


@backends
def test_views_are_ordered_view_by_view(backend):
    features, labels = features_of("two_views")
    rows, names = torch.cat((features[:, 0], features[:, 1])), torch.cat((labels, labels))
    of_views = supcon_loss(features, labels, reduction="none", backend=backend)
    of_rows = supcon_loss(rows, names, reduction="none", backend=backend)
    assert of_views.shape == (96,)
    torch.testing.assert_close(of_views, of_rows, rtol=1e-13, atol=0)


@backends
def test_contrasts_of_another_dtype_are_converted(backend):
    arguments = by_id("memory").arguments()
    features = arguments.pop("features").bfloat16()  # as under autocast, beside a float32 queue
    memory = arguments.pop("contrast_features").float().requires_grad_()
    loss = supcon_loss(features, **arguments, contrast_features=memory, backend=backend)
    converted = memory.bfloat16()
    expected = supcon_loss(features, **arguments, contrast_features=converted, backend=backend)
    assert torch.equal(loss, expected)
    loss.backward()
    assert memory.grad.dtype == torch.float32
    assert memory.grad.any()


@backends
def test_one_mode_is_the_first_views_of_all_mode(backend):
    features, labels = features_of("two_views")
    options = {"reduction": "none", "backend": backend}
    one = supcon_loss(features, labels, contrast_mode="one", **options)
    assert one.shape == (48,)
    torch.testing.assert_close(one, supcon_loss(features, labels, **options)[:48])


@backends
def test_no_labels_means_that_views_are_positives(backend):
    features, _ = features_of("unlabelled_views")
    samples = torch.arange(len(features))
    unlabelled = supcon_loss(features, ignore_index=0, backend=backend)
    torch.testing.assert_close(unlabelled, supcon_loss(features, samples, backend=backend))


@pytest.mark.parametrize("backend", [None, "tiled", "reference"])
def test_labels_and_their_mask_and_their_one_hot_rows_agree(backend):
    features, labels = features_of("two_views")
    options = {"reduction": "none", "backend": backend}
    expected = supcon_loss(features, labels, **options)
    mask = labels[:, None] == labels
    for other in (
        {"mask": mask},
        {"mask": mask.repeat(2, 2)},
        {"labels": torch.nn.functional.one_hot(labels).float()},
        {"labels": torch.nn.functional.one_hot(labels).bool()},
        {"labels": labels[:, None]},
    ):
        torch.testing.assert_close(supcon_loss(features, **other, **options), expected)


@backends
def test_towers_are_clip(backend):
    images, texts = torch.randn(2, 9, 5, dtype=torch.float64)
    logits = torch.nn.functional.normalize(images) @ torch.nn.functional.normalize(texts).T / 0.07
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(9))
    loss = supcon_loss(images, contrast_features=texts, backend=backend)
    torch.testing.assert_close(loss, expected)


@backends
@pytest.mark.parametrize("reduction", ["mean", "positive_mean", "sum"])
@pytest.mark.parametrize("name", ["symmetric_towers", "symmetric_memory", "symmetric_mask"])
def test_symmetric_is_the_mean_of_both_ways(backend, name, reduction):
    arguments = {**by_id(name).arguments(), "reduction": reduction}
    if not takes(backend, arguments):
        return
    arguments["backend"] = backend
    loss = supcon_loss(**arguments)
    del arguments["symmetric"]
    one_way = supcon_loss(**arguments)
    for a, b in (("features", "contrast_features"), ("labels", "contrast_labels")):
        arguments[a], arguments[b] = arguments.get(b), arguments.get(a)
    if "mask" in arguments:
        arguments["mask"] = arguments["mask"].T
    torch.testing.assert_close(loss, (one_way + supcon_loss(**arguments)) / 2)


@pytest.mark.parametrize("scale", [10.0, torch.tensor(10.0), torch.tensor([10.0]).half()])
def test_clip_loss_is_the_symmetric_call(scale):
    images, texts = torch.randn(2, 9, 5)
    expected = supcon_loss(images, contrast_features=texts, symmetric=True, temperature=0.1)
    torch.testing.assert_close(ClipLoss()(images, texts, scale), expected)
    named = ClipLoss()(images, texts, logit_scale=scale, output_dict=True)
    torch.testing.assert_close(named, {"contrastive_loss": expected})


@backends
def test_symmetric_towers_are_clip(backend):
    images, texts = torch.randn(2, 9, 5, dtype=torch.float64)
    logits = torch.nn.functional.normalize(images) @ torch.nn.functional.normalize(texts).T / 0.07
    ways = [torch.nn.functional.cross_entropy(x, torch.arange(9)) for x in (logits, logits.T)]
    loss = supcon_loss(images, contrast_features=texts, symmetric=True, backend=backend)
    torch.testing.assert_close(loss, sum(ways) / 2)


@backends
@pytest.mark.parametrize("reduction, expected", [("mean", 6 / 4), ("positive_mean", 6 / 3)])
def test_what_a_mean_counts(backend, reduction, expected):
    # Four anchors, of which one has no positive, and an ignored row.
    features, labels = torch.randn(5, 3), torch.tensor([0, 0, 0, 1, NOWHERE])
    total = supcon_loss(features, labels, reduction="sum", backend=backend)
    mean = supcon_loss(features, labels, reduction=reduction, backend=backend)
    torch.testing.assert_close(mean, total * expected / 6)


@backends
def test_positive_mean_counts_anchors_whose_loss_is_not_above_zero(backend):
    # Two rows alike and one apart at τ = 1: the denominator of the former is e^0, their loss -1.
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    options = {"temperature": 1.0, "denominator": "only_negatives", "backend": backend}
    labels = torch.tensor([0, 0, 1])
    loss = supcon_loss(features, labels, reduction="positive_mean", **options)
    assert float(loss) == pytest.approx(-1.0, abs=1e-6)


@backends
def test_what_comes_from_above_an_idle_anchor_does_not_matter(backend):
    features = torch.randn(6, 3, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 2, 3, NOWHERE])
    losses = supcon_loss(features, labels, reduction="none", backend=backend)
    losses.sqrt().sum().backward()  # the derivative of the root is infinite at 0
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("backend", [None, "tiled", "reference"])
def test_a_mask_keeps_its_sign_however_small(backend):
    features, mask = torch.randn(4, 3), torch.ones(4, 4, dtype=torch.float64)
    mask[:, 3], mask[3] = -1e-50, 1e-50
    loss = supcon_loss(features, mask=mask, reduction="none", backend=backend)
    expected = supcon_loss(features[:3], torch.zeros(3).long(), reduction="none")
    torch.testing.assert_close(loss[:3], expected)
    assert loss[3] > 0


@backends
@pytest.mark.parametrize("reduction", ["mean", "positive_mean", "sum"])
@pytest.mark.parametrize("name", ["single_row", "empty", "empty_views", "all_ignored"])
def test_nothing_to_learn_from_costs_nothing(backend, name, reduction):
    arguments = by_id(name).arguments()
    features = arguments.pop("features").requires_grad_()
    loss = supcon_loss(features, **arguments, reduction=reduction, backend=backend)
    loss.backward()
    assert loss.item() == 0.0
    assert features.grad.shape == features.shape
    assert not features.grad.any()


@backends
def test_ignored_rows_are_as_if_absent(backend):
    arguments = by_id("ignored_garbage").arguments()
    features, labels = arguments["features"], arguments["labels"]
    kept = labels != NOWHERE
    whole, without = features.clone().requires_grad_(), features[kept].clone().requires_grad_()
    loss = supcon_loss(whole, labels, backend=backend)
    expected = supcon_loss(without, labels[kept], backend=backend)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(whole.grad[kept], without.grad)
    assert not whole.grad[~kept].any()


@backends
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_non_finite_row_that_takes_part_makes_the_loss_nan(backend, garbage, normalize):
    features, labels = features_of("singleton")
    features[0, 3] = garbage  # row 0 has no positive: nothing but its column could tell
    options = {"normalize": normalize, "backend": backend}
    assert supcon_loss(features, labels, **options).isnan()
    memory = {"contrast_features": features, "contrast_labels": labels}
    assert supcon_loss(features[1:], labels[1:], **memory, **options).isnan()


@backends
def test_zero_rows_stay_zero_and_norms_do_not_overflow(backend):
    torch.manual_seed(0)
    features, labels = torch.randn(12, 4), torch.arange(12) % 3
    directions = supcon_loss(features, labels, backend=backend)
    far = features * torch.tensor([1e37, 1e-30, 1.0])[torch.arange(12) % 3, None]
    torch.testing.assert_close(supcon_loss(far, labels, backend=backend), directions)
    features[2] = 0.0
    features.requires_grad_()
    supcon_loss(features, labels, backend=backend).backward()
    assert features.grad.isfinite().all()
    assert not features.grad[2].any()


@backends
def test_self_similarity_stays_out_of_the_maximum(backend):
    # Similarities of -1/τ = -1000 to the other rows: beside an own 1000 they would all be 0.
    features = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    labels = torch.tensor([0, 0, 1])
    loss = supcon_loss(features, labels, temperature=1e-3, reduction="none", backend=backend)
    assert float(loss[0]) == pytest.approx(math.log(2), abs=1e-3)  # similarities end on 6e-5


@backends
def test_base_temperature_scales(backend):
    features, labels = features_of("aligned")
    plain = supcon_loss(features, labels, temperature=0.1, backend=backend)
    options = {"base_temperature": 0.05, "backend": backend}
    for temperature in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        loss = supcon_loss(features, labels, temperature=temperature, **options)
        torch.testing.assert_close(loss, plain * 2)
    half = torch.tensor(0.1, dtype=torch.float16)
    plain = supcon_loss(features, labels, temperature=float(half), backend=backend)
    loss = supcon_loss(features, labels, temperature=half, **options)
    torch.testing.assert_close(loss, plain * (float(half) / 0.05))


def test_module_is_a_drop_in():
    features, labels = features_of("two_views")
    mask = labels[:, None] == labels
    expected = supcon_loss(
        features, labels, temperature=0.2, contrast_mode="one", base_temperature=0.1
    )
    criterion = SupConLoss(0.2, "one", 0.1)
    assert criterion(features, labels) == expected
    assert criterion(features, None, mask) == expected
    assert criterion(features.unflatten(2, (4, 8)), labels) == expected
    assert SupConLoss()(features, labels) == supcon_loss(features, labels, base_temperature=0.07)
    towers = {"contrast_features": features[:, 1], "symmetric": True}
    expected = supcon_loss(features, **towers, temperature=0.2, base_temperature=0.1)
    assert criterion(features, **towers) == expected


def test_module_learns_its_temperature():
    features, labels = features_of("two_views")
    criterion = SupConLoss(torch.nn.Parameter(torch.tensor(0.1)), base_temperature=None)
    criterion(features, labels).backward()
    assert [name for name, _ in criterion.named_parameters()] == ["temperature"]
    assert criterion.temperature.grad.abs() > 0
