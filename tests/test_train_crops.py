"""Crops of images in files: cut from the whole image, and functions of seed, epoch, place and view."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

import train_fixtures  # noqa: F401  puts train/ on the path
from data.batches import BatchOptions, training_batches
from data.images import Split
from run.errors import UserError
from run.processes import Ranks
from train_fixtures import metrics, pretrain, weights, write_images
from train_parts import build_views, load_data, options_of, training_images

WIDTH, HEIGHT = 200, 150


@pytest.fixture(scope="module")
def coordinates(tmp_path_factory):
    """Images whose red is the column and whose green is the row of a pixel."""
    folder = tmp_path_factory.mktemp("images")
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    pixels = np.stack([columns, rows, 0 * rows], axis=2).astype(np.uint8)
    for name in ("a", "b"):
        (folder / name).mkdir()
        for number in range(10):
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return options_of(dataset=f"imagefolder:{folder}", val_fraction=0.1, image_size=16)


def crops(config, *, workers=0, epoch=0, step=0, **place):
    """(steps * B, V, C, s, s) of an epoch, from a step on."""
    order, batches = training_batches(
        training_images(config, load_data(config)),
        BatchOptions(batch_size=6, workers=workers),
        seed=config.seeds.seed,
        ranks=Ranks(**place),
    )
    order.begin(epoch, step)
    return torch.cat([images for images, _ in islice(batches, len(order))])


def test_crops_come_from_the_whole_image_with_the_areas_asked_for(coordinates):
    for least in (0.08, 0.5):
        cut = crops(coordinates.changed(num_views=40, min_crop_area=least)).flatten(0, 1).float()
        width, height = (cut[:, c].amax((1, 2)) - cut[:, c].amin((1, 2)) for c in (0, 1))
        # From centre to centre of the outermost pixels it is a sixteenth less.
        area = (width * height) / (15 / 16) ** 2 / (WIDTH * HEIGHT)
        assert least - 0.03 < area.min() < least + 0.05 and area.max() > 0.8
        # The centre square spans columns 25 to 175.
        assert cut[:, 0].min() < 10 and cut[:, 0].max() > 190


def test_crops_depend_on_seed_epoch_place_and_view_alone(coordinates):
    whole = crops(coordinates)
    assert whole.shape == (18, 2, 3, 16, 16) and whole.dtype == torch.uint8
    assert torch.equal(crops(coordinates, workers=2), whole)
    assert torch.equal(crops(coordinates, step=1), whole[6:])
    halves = [crops(coordinates, rank=rank, world_size=2) for rank in (0, 1)]
    assert torch.equal(torch.stack(halves, dim=1).flatten(0, 1), whole)
    for other in (crops(coordinates, epoch=1), crops(coordinates.changed(seed=1)), whole.flip(1)):
        assert not torch.equal(other, whole)


def test_image_that_comes_twice_is_cropped_twice(coordinates):
    config = coordinates.changed(num_views=2)
    data = load_data(config)
    few = data.train.take([0, 1, 10, 11, 12, 13])
    _, batches = training_batches(
        training_images(config, replace(data, train=few)),
        BatchOptions(batch_size=6, classes_per_batch=2),
        seed=0,
    )
    (images, _) = next(iter(batches))
    assert len({tuple(crop.flatten().tolist()) for crop in images.flatten(0, 1)}) == 12


@pytest.mark.parametrize("workers", [0, 2])
def test_larger_originals_in_memory_are_cropped_alike(coordinates, monkeypatch, workers):
    def stl10(root, fetch):
        files = load_data(coordinates).train
        images = torch.stack([pil_to_tensor(files.images.decode(i)) for i in range(len(files))])
        whole = Split(images[..., :HEIGHT].contiguous(), files.labels)
        return whole, whole, ["a", "b"]

    monkeypatch.setattr("data.sources._stl10", stl10)
    config = coordinates.changed(dataset="stl10", val_fraction=None, num_views=20)
    kept = load_data(config).train.take([1, 0])
    assert kept.images.shape == (2, 3, 16, 16) and kept.originals.shape == (2, 3, HEIGHT, HEIGHT)
    cut = crops(config, workers=workers)
    assert cut.shape == (18, 20, 3, 16, 16) and cut[:, :, :2].max() > HEIGHT - 5
    # At their own size they are cropped on the device, as those of other data sets.
    assert crops(config.changed(image_size=HEIGHT)).shape[1:] == (3, HEIGHT, HEIGHT)


def test_cropping_leaves_the_random_state_alone(coordinates):
    before = torch.get_rng_state()
    crops(coordinates)
    assert torch.equal(torch.get_rng_state(), before)


def test_views_begin_with_the_crop_of_their_number(coordinates):
    config = coordinates.changed(augment="crop_flip")
    data = load_data(config)
    views = build_views(
        config.changed(mean=[0.0], std=[1.0]), replace(data, mean=[0] * 3, std=[1] * 3)
    )
    cut = crops(config)
    for number in (0, 1):
        view = views.random(cut, step=0, view=number)
        expected = cut[:, number].float() / 255
        flipped = (view == expected.flip(-1)).flatten(1).all(1)
        assert (flipped | (view == expected).flatten(1).all(1)).all() and flipped.any()


def test_runs_with_other_views_are_refused_and_all_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.draw", lambda *arguments: None)

    def without_views(run):
        saved = torch.load(run / "last.pt", weights_only=True)
        del saved["data"]["views"]
        torch.save(saved, run / "last.pt")
        return run / "last.pt"

    write_images(tmp_path / "images", {"cat": 12, "dog": 12})
    files = ("--dataset", f"imagefolder:{tmp_path / 'images'}", "--val_fraction", 0.25)
    options = (*files, "--batch_size", 8, "--max_steps", 3, "--save_every", 2)
    whole = pretrain(tmp_path / "files", *options)
    resumed = pretrain(tmp_path / "files", *options, "--resume", whole / "step-2.pt")
    assert metrics(resumed)
    old = without_views(whole)
    with pytest.raises(
        UserError, match=r"cannot resume .* \(crops of whole images, .*\); --init_from"
    ):
        pretrain(tmp_path / "files", *options, "--resume", old)

    options = ("--max_steps", 1, "--knn_bank", 100)
    run = pretrain(tmp_path / "digits", *options)
    expected = weights(run)
    resumed = pretrain(tmp_path / "digits", *options, "--resume", without_views(run))
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())
