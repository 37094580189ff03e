"""The part of a training set that a run learns from: which images, with which labels."""

import pytest
import torch

import train_fixtures  # noqa: F401  puts train/ on the path
from data.training_part import long_tail, shares
from linear import main as linear
from run.errors import UserError
from run.saved_run import open_run
from train_fixtures import pretrain
from train_parts import load_data, options_of


def of_digits(**options):
    return load_data(options_of(**options))


def indices(part, whole):
    """Where the images of a part are in the whole set, in which no two are the same."""
    where = {tuple(image.flatten().tolist()): n for n, image in enumerate(whole.images)}
    return [where[tuple(image.flatten().tolist())] for image in part.images]


def test_part_has_of_each_class_its_share_and_lies_within_a_larger_one():
    whole = of_digits().train
    small, large, again, other = (
        of_digits(train_images=count, seed=seed).train
        for count, seed in ((100, 0), (400, 0), (100, 0), (100, 1))
    )
    places = [indices(part, whole) for part in (small, large, again, other)]
    assert [len(part) for part in (small, large)] == [100, 400]
    assert set(places[0]) < set(places[1])
    assert places[0] == places[2] == sorted(places[2]) and places[0] != places[3]
    for part in (small, large):
        expected = torch.bincount(whole.labels) * len(part) / len(whole)
        assert (torch.bincount(part.labels) - expected).abs().max() < 1.5
        assert torch.equal(part.labels, whole.labels[indices(part, whole)])


def test_smallest_part_has_one_of_each_class_and_the_largest_all():
    labels = torch.tensor([0] * 1 + [3] * 20 + [5] * 500)
    assert list(shares(labels, 3).values()) == [1, 1, 1]
    assert list(shares(labels, 521).values()) == [1, 20, 500]
    assert all(sum(shares(labels, count).values()) == count for count in range(3, 522))
    for count in (9, 1348):
        with pytest.raises(UserError, match=rf"--train_images {count}: must be from 10, one of"):
            of_digits(train_images=count)


def test_long_tail_falls_exponentially():
    assert list(long_tail(torch.arange(4).repeat_interleave(1000), 1000).values()) == [
        1000, 100, 10, 1,
    ]  # fmt: skip
    # No class gets more than it has, and one class is left alone.
    assert list(long_tail(torch.tensor([0] * 8 + [1] * 100 + [2]), 10).values()) == [8, 31, 1]
    assert long_tail(torch.zeros(5, dtype=torch.long), 10) == {0: 5}
    counts = torch.bincount(of_digits(imbalance=20).train.labels)
    assert counts[0] == torch.bincount(of_digits().train.labels)[0]
    assert counts.diff().le(0).all() and counts[-1] == 6


def test_noise_moves_a_share_of_the_training_labels_and_no_others():
    clean = of_digits(validation_fraction=0.2)
    noisy, again, other = (
        of_digits(validation_fraction=0.2, label_noise=0.3, seed=seed) for seed in (0, 0, 1)
    )
    moved = noisy.train.labels != clean.train.labels
    assert moved.sum() == round(0.3 * len(moved))
    assert torch.equal(noisy.train.images, clean.train.images)
    assert torch.equal(noisy.train.labels, again.train.labels)
    assert not torch.equal(noisy.train.labels, other.train.labels)
    for name in ("test", "validation"):
        assert torch.equal(getattr(noisy, name).labels, getattr(clean, name).labels)
    # Each of the nine other classes about as often.
    steps = (noisy.train.labels - clean.train.labels)[moved] % 10
    assert torch.bincount(steps, minlength=10)[1:].min() > 15


def test_it_is_recorded_with_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.draw", lambda *arguments: None)
    options = ("--train_images", 300, "--label_noise", 0.2, "--imbalance", 5)
    saved = open_run(pretrain(tmp_path, "--max_steps", 1, *options))
    data = load_data(saved.options)
    assert len(data.train) == saved.about_images["num_images"] == 300
    assert data.train.order == saved.about_images["order"]
    assert data.mean == saved.about_images["mean"]
    # The linear stage fits on these images and on no others.
    argv = ["--checkpoint", str(saved.path), "--device=cpu", "--validation_fraction"]
    with pytest.raises(
        UserError, match=r"^--validation_fraction 0\.2 contradicts the --train_images"
    ):
        linear([*argv, "0.2"])
