"""What the random views are made of: the changes of the policies and of grey images, as published."""

import math

import pytest
import torch
from torchvision.transforms.v2 import functional as transforms

import train_fixtures  # noqa: F401  puts train/ on the path
from data.policies import AUTOAUGMENT_SHIFT, IMAGENET_POLICY, Policy, autoaugment
from data.views import GreyJitter
from train_parts import build_views, load_data, options_of

LEVEL_10 = {
    "rotate": lambda x: transforms.rotate(x, -30, fill=[128 / 255] * 3),
    "posterize": lambda x: (x * 255).byte().bitwise_and(0xF0) / 255,
    "solarize": lambda x: x,
    "solarize_add": lambda x: torch.where(x < 128 / 255, (x + 110 / 255).clamp(max=1), x),
    "color": lambda x: transforms.adjust_saturation(x, 1.9),
    "contrast": lambda x: transforms.adjust_contrast(x, 1.9),
    "brightness": lambda x: transforms.adjust_brightness(x, 1.9),
    "sharpness": lambda x: transforms.adjust_sharpness(x, 1.9),
    "shear_x": lambda x: transforms.affine(
        x,
        0.0,
        [0, 0],
        1.0,
        [math.degrees(math.atan(0.3)), 0.0],
        fill=[128 / 255] * 3,
        center=[0, 0],
    ),
}


def changed(images, *changes):
    """Images after changes by name, probability and level."""
    return Policy([[changes]], shift=AUTOAUGMENT_SHIFT)(images)


@pytest.mark.parametrize("name", LEVEL_10)
def test_policies_change_images_as_much_as_the_authors(monkeypatch, name):
    monkeypatch.setattr("data.policies.SIGNED", {})
    images = torch.randint(256, (2, 3, 28, 28), generator=torch.Generator().manual_seed(0)) / 255
    # A step of posterize is coarser in floats: it divides by 1 where bytes end at 255.
    tolerance = 1 / 16 if name == "posterize" else 1e-6
    found = changed(images, (name, 1.0, 10))
    torch.testing.assert_close(found, LEVEL_10[name](images), rtol=0, atol=tolerance)


def test_lengths_of_the_policies_are_shares_of_the_side(monkeypatch):
    monkeypatch.setattr("data.policies.SIGNED", {})
    stripe = torch.zeros(1, 3, 224, 224)
    stripe[..., 100] = 1
    moved = changed(stripe, ("translate_x", 1.0, 4))
    assert moved[0, 0, 0].argmax() == 100 + round(0.4 * 0.5 * 224)
    grey = changed(stripe, ("cutout", 1.0, 10)) == 128 / 255
    assert 40 <= grey[0, 0].any(0).sum() <= 80 and 40 <= grey[0, 0].any(1).sum() <= 80


def test_signed_changes_go_to_either_side_with_their_probability():
    stripe = torch.zeros(200, 3, 32, 32)
    stripe[..., 16] = 1
    torch.manual_seed(0)
    moved = changed(stripe, ("translate_x", 0.5, 4))
    left, still, right = (int((moved[:, 0, 0].argmax(1) == place).sum()) for place in (10, 16, 22))
    assert left + still + right == 200 and 35 <= left <= 65 and 35 <= right <= 65


def test_changes_of_a_policy_come_in_turn_and_stay_with_their_image():
    # Each image a grey of its own, which the first change inverts and the second darkens.
    images = torch.linspace(0.2, 0.6, 50).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    found = changed(images, ("invert", 1.0, None), ("brightness", 1.0, 0))
    torch.testing.assert_close(found, 0.1 * (1 - images))


def test_policies_draw_every_choice_with_its_probabilities():
    torch.manual_seed(0)
    policy = autoaugment(cifar=False)
    kinds, _ = policy.draw(20_000, 32)
    names = [[policy.kind_of(name) for name, *_ in pair] for pair in IMAGENET_POLICY]
    for number in range(2):
        for kind in set(dict.fromkeys(pair[number] for pair in names)):
            share = sum(
                pair[number][1] for pair, of in zip(IMAGENET_POLICY, names) if of[number] == kind
            ) / len(IMAGENET_POLICY)
            assert (kinds[number] == kind).float().mean() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("contrast_first", [True, False])
def test_grey_images_change_as_torchvision_changes_them(monkeypatch, contrast_first):
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images[0] = 0
    brightness, contrast = [1.4, 0.6, 1.3, 0.9], [0.7, 1.4, 0.6, 1.2]
    # What is drawn, in order: whether, the factors in [1 - 0.4, 1 + 0.4], the order of the two.
    factors = (torch.tensor([brightness, contrast]).view(2, 4, 1, 1, 1) - 0.6) / 0.8
    order = torch.full((4, 1, 1, 1), 0.0 if contrast_first else 1.0)
    drawn = iter([torch.zeros(4, 1, 1, 1), factors, order])
    monkeypatch.setattr("torch.rand", lambda *shape: next(drawn))
    changed = GreyJitter(0.4, p=0.8)(images)
    for image, found, b, c in zip(images, changed, brightness, contrast):
        changes = [(transforms.adjust_brightness, b), (transforms.adjust_contrast, c)]
        for change, factor in reversed(changes) if contrast_first else changes:
            image = change(image, factor)
        torch.testing.assert_close(found, image)
    assert torch.equal(changed[0], images[0])  # black stays black


def test_grey_images_are_changed_by_that():
    config = options_of(augment="simclr")
    views = build_views(config, load_data(config))
    assert any(isinstance(part, GreyJitter) for part in views.pipeline)


def test_stacked_randaugment_has_the_authors_jitter_and_blur():
    config = options_of(augment="stacked_randaugment", in_chans=3)
    views = build_views(config, load_data(config))
    jitter, blur = views.pipeline[2], views.pipeline[-1]
    assert [getattr(jitter, part) for part in ("brightness", "contrast", "saturation", "hue")] == [
        0.8, 0.8, 0.8, 0.2
    ]  # fmt: skip
    assert jitter.p == 0.8 and blur.p == 0.5
