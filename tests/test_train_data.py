"""The data sets: read from small files made here, from their real files, and their mistakes."""

import gzip
import pickle
import shutil
import struct
from functools import partial
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

import train_fixtures  # noqa: F401  puts train/ on the path
from data.batches import BatchOptions, training_batches
from data.folders import ClassFolders
from data.images import ImageFiles
from data.order import BalancedOrder, TrainingOrder
from data.sources import stratified_split, subset
from run.command_line import run_script
from run.errors import UserError
from run.processes import Ranks
from train_fixtures import metrics, pretrain, write_images
from train_parts import load_data, options_of, trainer_of


def write_idx(path, array, *, packed):
    """Write a uint8 array in the idx format: two zeros, type 8, its rank and sizes, its bytes."""
    content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    if packed:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


def write_fashion_mnist(folder, *, packed, num_classes=10):
    """Write 40 training and 20 test images of 28x28; returns them."""
    rng = np.random.default_rng(0)
    splits = []
    for prefix, count in (("train", 40), ("t10k", 20)):
        labels = np.arange(count, dtype=np.uint8) % num_classes
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(folder / f"{prefix}-images-idx3-ubyte", images, packed=packed)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", labels, packed=packed)
        splits.append((images, labels))
    return splits


@pytest.mark.parametrize(
    ("layout", "packed"),
    [(".", True), (".", False), ("FashionMNIST/raw", False)],
    ids=["debian, gz", "debian, unpacked", "torchvision"],
)
def test_fashion_mnist_layouts(tmp_path, layout, packed):
    (train, train_labels), (test, test_labels) = write_fashion_mnist(
        tmp_path / layout, packed=packed
    )
    files = sorted(tmp_path.rglob("*"))
    data = load_data(options_of(dataset="fashion_mnist", data_root=str(tmp_path)))
    assert torch.equal(data.train.images, torch.from_numpy(train)[:, None])
    assert torch.equal(data.test.images, torch.from_numpy(test)[:, None])
    assert data.train.labels.tolist() == train_labels.tolist()
    assert data.test.labels.tolist() == test_labels.tolist()
    assert data.classes[9] == "Ankle boot" and data.image_size == 28
    assert data.mean == pytest.approx([train.mean() / 255])
    assert data.std == pytest.approx([train.std() / 255])
    assert sorted(tmp_path.rglob("*")) == files, "the data folder was written to"


def test_damaged_fashion_mnist_names_the_file(tmp_path):
    write_fashion_mnist(tmp_path, packed=True)
    damaged = tmp_path / "t10k-images-idx3-ubyte.gz"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(UserError, match=rf"cannot read {damaged}"):
        load_data(options_of(dataset="fashion_mnist", data_root=str(tmp_path)))


@pytest.mark.parametrize("dataset", ["fashion_mnist", "cifar10", "cifar100", "stl10"])
def test_missing_data_set_names_folder_and_remedy(tmp_path, monkeypatch, dataset):
    def no_network(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(UserError, match=rf"not found in {tmp_path}.*no network.*--data_root"):
        load_data(options_of(dataset=dataset, data_root=str(tmp_path)))


def test_cifar10_through_torchvision(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
    for name in ("data_batch_1", "test_batch"):
        content = {"data": pixels, "labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(content))
    names = [f"class{label}" for label in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr(CIFAR10, "train_list", [("data_batch_1", None)])
    monkeypatch.setattr(CIFAR10, "test_list", [("test_batch", None)])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})

    data = load_data(options_of(dataset="cifar10", data_root=str(tmp_path)))
    assert torch.equal(data.train.images, torch.from_numpy(pixels.reshape(10, 3, 32, 32)))
    assert data.classes == names and data.channels == 3
    grey = load_data(options_of(dataset="cifar10", data_root=str(tmp_path), in_chans=1))
    luma = (data.test.images * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, True)
    assert torch.equal(grey.test.images, luma.round().to(torch.uint8))
    assert (grey.channels, len(grey.mean)) == (1, 1)


def test_stl10_through_torchvision(tmp_path, monkeypatch):
    from torchvision.datasets import STL10

    folder = tmp_path / STL10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    images, labels = {}, {"train": np.arange(20) % 10, "test": np.arange(10)[::-1]}
    for split, numbers in labels.items():
        images[split] = rng.integers(0, 256, (len(numbers), 3, 96, 96), dtype=np.uint8)
        # In the files columns come before rows, and the first class is 1.
        images[split].transpose(0, 1, 3, 2).tofile(folder / f"{split}_X.bin")
        (numbers + 1).astype(np.uint8).tofile(folder / f"{split}_y.bin")
        files = [[f"{split}_{part}.bin", None] for part in ("X", "y")]
        monkeypatch.setattr(STL10, f"{split}_list", files)
    names = [f"class{label}" for label in range(10)]
    (folder / "class_names.txt").write_text("\n".join(names) + "\n")

    data = load_data(options_of(dataset="stl10", data_root=str(tmp_path)))
    for split, expected in ((data.train, "train"), (data.test, "test")):
        assert torch.equal(split.images, torch.from_numpy(images[expected]))
        assert split.labels.tolist() == labels[expected].tolist()
    assert data.classes == names and data.image_size == 96
    assert data.mean == pytest.approx((images["train"] / 255).mean((0, 2, 3)))

    options = ("--dataset", "stl10", "--data_root", tmp_path, "--image_size", 32)
    run = pretrain(tmp_path / "runs", *options, "--batch_size", 8, "--max_steps", 1)
    assert len(metrics(run)) == 3


def test_digits_split_is_stratified_and_fixed():
    data, again = (load_data(options_of(seed=seed)) for seed in (0, 1))
    assert torch.equal(data.test.images, again.test.images)
    assert len(data.train) + len(data.test) == 1797
    every = torch.bincount(torch.cat([data.train.labels, data.test.labels]))
    share = torch.bincount(data.test.labels) / every
    assert share.tolist() == pytest.approx([0.25] * 10, abs=0.005)
    assert data.train.images.shape[1:] == (1, 16, 16) and data.train.images.max() > 250


def test_stratified_split_keeps_a_single_sample():
    labels = torch.tensor([0] * 10 + [1] * 2 + [2])
    stay, held_out = stratified_split(labels, 0.3)
    assert sorted(stay + held_out) == list(range(13))
    assert torch.bincount(labels[held_out], minlength=3).tolist() == [3, 1, 0]


def test_order_is_a_function_of_seed_and_epoch():
    order = TrainingOrder(23, 5, seed=3)
    order.begin(epoch=2)
    epoch = list(order)
    assert [len(batch) for batch in epoch] == [5] * 4
    assert len({index for batch in epoch for index in batch}) == 20
    order.begin(epoch=2, step=3)
    assert list(order) == epoch[3:]
    order.begin(epoch=1)
    assert list(order) != epoch
    assert list(TrainingOrder(23, 5, seed=4)) != list(TrainingOrder(23, 5, seed=3))


# Five classes, one of which has fewer images than a batch takes of it, in no order.
LABELS = torch.tensor([0] * 40 + [1] * 25 + [2] * 3 + [4] * 17 + [7] * 15)[
    torch.randperm(100, generator=torch.Generator().manual_seed(0))
]


def test_balanced_batches_hold_so_many_classes_with_as_many_images():
    order = BalancedOrder(LABELS, 12, seed=0, classes_per_batch=3)
    batches = list(order)
    assert len(batches) == len(order) == 8
    for batch in batches:
        classes, counts = LABELS[batch].unique(return_counts=True)
        assert len(classes) == 3 and counts.tolist() == [4, 4, 4]
        repeated = [index for index in set(batch) if batch.count(index) > 1]
        assert {LABELS[index].item() for index in repeated} <= {2}
    # Each class comes 24 / 5 times, up to one; each image of a class as often as any other.
    drawn = torch.bincount(torch.tensor(batches).flatten(), minlength=100)
    for label in LABELS.unique():
        times = drawn[label == LABELS]
        assert times.sum() in (4 * 4, 5 * 4)
        assert times.max() - times.min() <= 1


def test_balanced_order_is_a_function_of_seed_and_epoch_from_any_step():
    order = BalancedOrder(LABELS, 12, seed=3, classes_per_batch=3)
    order.begin(epoch=2)
    epoch = list(order)
    for step in range(9):
        order.begin(epoch=2, step=step)
        assert list(order) == epoch[step:]
    order.begin(epoch=1)
    assert list(order) != epoch
    other = BalancedOrder(LABELS, 12, seed=4, classes_per_batch=3)
    other.begin(epoch=2)
    assert list(other) != epoch


@pytest.mark.parametrize("world_size", [2, 3, 6])
@pytest.mark.parametrize(
    "make_order",
    [
        partial(TrainingOrder, 100, 12, 3),
        partial(BalancedOrder, LABELS, 12, 3, classes_per_batch=2),
    ],
    ids=["all alike", "balanced"],
)
def test_processes_share_out_what_one_would_see(make_order, world_size):
    alone = make_order()
    ranks = [make_order(rank=rank, world_size=world_size) for rank in range(world_size)]
    for epoch, step in ((0, 0), (4, 0), (4, 5)):
        for order in (alone, *ranks):
            order.begin(epoch, step)
        whole, *parts = (list(order) for order in (alone, *ranks))
        assert [len(part) for part in parts] == [len(whole)] * world_size == [8 - step] * world_size
        for batch, *shares in zip(whole, *parts):
            assert [len(share) for share in shares] == [12 // world_size] * world_size
            assert sorted(index for share in shares for index in share) == sorted(batch)
            if isinstance(alone, BalancedOrder):
                # As balanced as the batch: no process has but one of its classes.
                counts = [torch.bincount(LABELS[share], minlength=8) for share in shares]
                assert all(torch.equal(count, counts[0]) for count in counts)


def test_batch_that_cannot_be_shared_out():
    train = load_data(options_of()).train

    def make(batch_size, **place):
        options = BatchOptions(batch_size=batch_size)
        return training_batches(train, options, seed=0, ranks=Ranks(**place))

    with pytest.raises(UserError, match="--batch_size 100 is no multiple of the 8 processes"):
        make(batch_size=100, world_size=8)
    order, batches = make(batch_size=96, rank=7, world_size=8)
    assert {len(labels) for _, labels in batches} == {12}
    assert len(batches) == len(order) == len(train) // 96


def test_balanced_run_resumes_to_the_bit_with_workers(tmp_path):
    options = ("--batch_size", 256, "--classes_per_batch", 8, "--max_steps", 7, "--save_every", 3)
    options += ("--keep", 9, "--knn_bank", 100)
    whole = pretrain(tmp_path / "whole", *options)
    stopped = pretrain(tmp_path / "other", *options, "--workers", 2)
    resumed = pretrain(tmp_path / "other", *options, "--resume", stopped / "step-3.pt")
    assert metrics(whole) == metrics(stopped) == metrics(resumed)


def test_more_classes_per_batch_than_there_are(tmp_path):
    with pytest.raises(UserError, match="--classes_per_batch 16: the training set has 10 classes"):
        pretrain(tmp_path, "--classes_per_batch", 16)
    assert not list(tmp_path.iterdir())


def test_loading_draws_on_no_global_random_state():
    data = load_data(options_of())
    _, batches = training_batches(data.train, BatchOptions(batch_size=64), seed=0)
    before = torch.get_rng_state()
    first = [labels for _, labels in batches]
    assert torch.equal(torch.get_rng_state(), before)
    assert len(first) == len(data.train) // 64


def test_subset_is_nested_in_the_split():
    data = load_data(options_of())
    part = subset(data.train, 200)
    assert len(part) == 200 and part.labels.unique().numel() == 10
    assert subset(data.train, 0) is data.train


def test_batch_larger_than_the_data(tmp_path):
    with pytest.raises(UserError, match=r"--batch_size 2000 is larger than.*1347 images"):
        pretrain(tmp_path, "--batch_size", 2000)
    assert not list(tmp_path.iterdir())


FOLDER = ("--batch_size", 8, "--epochs", 2, "--knn_every", 1)


def test_imagefolder_repeats_with_workers(tmp_path):
    write_images(tmp_path / "images/train", {"cat": 12, "dog": 9})
    write_images(tmp_path / "images/val", {"cat": 3, "dog": 3})
    dataset = ("--dataset", f"imagefolder:{tmp_path / 'images'}")
    runs = [pretrain(tmp_path / f"workers{n}", *dataset, *FOLDER, "--workers", n) for n in (0, 2)]
    assert runs[0].name == "imagefolder-images-supcon-seed0"
    assert len(metrics(runs[0])) == 2 * (21 // 8) + 3
    assert (runs[0] / "metrics.csv").read_bytes() == (runs[1] / "metrics.csv").read_bytes()


def test_imagefolder_sizes_and_colours(tmp_path):
    write_images(tmp_path, {"red": 4, "green": 4}, size=(40, 30))
    data = load_data(
        options_of(dataset=f"imagefolder:{tmp_path}", val_fraction=0.25, image_size=14)
    )
    images, labels = data.train[[0, 5]]
    assert images.shape == (2, 3, 16, 16) and images.dtype == torch.uint8
    assert (len(data.train), len(data.test)) == (6, 2)
    assert data.classes == ["green", "red"] and labels.tolist() == [0, 1]
    red = images.float().mean((2, 3))[:, 0]
    assert red[0] > red[1] + 30, "the second class written is the redder one"


def test_in_chans_makes_images_grey_or_repeats_them(tmp_path):
    grey, colour = (load_data(options_of(in_chans=channels)) for channels in (1, 3))
    assert colour.channels == len(colour.mean) == 3
    assert torch.equal(colour.test.images, grey.test.images.expand(-1, 3, -1, -1))
    assert colour.mean == grey.mean * 3

    write_images(tmp_path, {"cat": 4, "dog": 4}, size=(16, 16))
    options = {"dataset": f"imagefolder:{tmp_path}", "val_fraction": 0.5, "image_size": 14}
    in_colour, in_grey = (load_data(options_of(in_chans=c, **options)) for c in (3, 1))
    assert (in_grey.channels, len(in_grey.mean), len(in_grey.std)) == (1, 1, 1)
    assert in_grey.mean[0] == pytest.approx(0.459, abs=1e-3)
    (colours, _), (greys, _) = in_colour.test[[0, 1]], in_grey.test[[0, 1]]
    assert greys.shape == (2, 1, 16, 16)
    luma = (colours.float() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, True)
    assert (greys - luma).abs().max() <= 1


def test_mean_and_std_of_the_user_are_used():
    data = load_data(options_of(mean=[0.25], std=[0.5]))
    assert (data.mean, data.std) == ([0.25], [0.5])
    with pytest.raises(UserError, match=r"--std \[0\.5, 0\.5, 0\.5\]: the images have 1 channels"):
        load_data(options_of(std=[0.5] * 3))


def test_imagefolder_needs_val_or_fraction(tmp_path):
    write_images(tmp_path / "train", {"cat": 4, "dog": 4})
    config = options_of(dataset=f"imagefolder:{tmp_path}")
    with pytest.raises(UserError, match=r"no val/ folder.*--val_fraction"):
        load_data(config)
    write_images(tmp_path / "val", {"cat": 2, "cow": 2})
    with pytest.raises(UserError, match=r"differ in the classes cow, dog"):
        load_data(config)
    config = config.changed(val_fraction=0.5)
    with pytest.raises(UserError, match=r"--val_fraction contradicts"):
        load_data(config)


@pytest.mark.parametrize("missing", ["nowhere", "empty"])
def test_imagefolder_without_images(tmp_path, missing):
    (tmp_path / "empty").mkdir()
    config = options_of(dataset=f"imagefolder:{tmp_path / missing}", val_fraction=0.5)
    with pytest.raises(UserError, match=missing):
        load_data(config)


def test_imagefolder_leaves_out_what_is_hidden_and_counts_images_of_other_types(tmp_path, capsys):
    for name in ("cat", "dog", ".git"):
        (tmp_path / name / ".ipynb_checkpoints").mkdir(parents=True)
    for name in (
        "cat/0.png",
        "cat/1.png",
        "dog/0.png",
        "dog/._0.png",
        "dog/.ipynb_checkpoints/0.png",
    ):
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    for name in ("cat/2.gif", "dog/1.avif", "dog/2.AVIF", "dog/notes.txt", "dog/.hidden.gif"):
        (tmp_path / name).touch()
    found = ClassFolders(tmp_path)
    assert found.classes == ["cat", "dog"] and found.targets == [0, 0, 1]
    assert capsys.readouterr().err.endswith("are left out: 2 .avif, 1 .gif\n")
    shutil.rmtree(tmp_path / "cat")
    shutil.rmtree(tmp_path / "dog")
    with pytest.raises(FileNotFoundError, match="any class folder"):
        ClassFolders(tmp_path)
    config = options_of(dataset=f"imagefolder:{tmp_path}", val_fraction=0.5)
    with pytest.raises(UserError, match=r"a folder of images \(\.jpg .*\.webp\)"):
        load_data(config)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_is_named_in_one_line(tmp_path, capsys, workers):
    write_images(tmp_path / "images", {"cat": 9, "dog": 9})
    damaged = tmp_path / "images/dog/3.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    dataset = ("--dataset", f"imagefolder:{tmp_path / 'images'}", "--val_fraction", 0.2)
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: pretrain(tmp_path, *dataset, *FOLDER, "--workers", workers))
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot read the image {damaged}: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("mode", "dtype", "name"), [("I;16", "<u2", "a.png"), ("I;16B", ">u2", "a.tiff")]
)
def test_16_bit_grey_is_scaled_to_8(tmp_path, mode, dtype, name):
    grey = (np.arange(64) * 1040).reshape(8, 8)
    path = str(tmp_path / name)
    Image.frombytes(mode, (8, 8), grey.astype(dtype).tobytes()).save(path)
    (image,) = ImageFiles([path], 8)[[0]]
    assert image.tolist() == 3 * [(grey // 256).tolist()]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_grey_without_a_fixed_white_is_refused(tmp_path, mode):
    path = str(tmp_path / "grey.tiff")
    Image.new(mode, (8, 8)).save(path)
    with pytest.raises(UserError, match=rf"cannot read the image {path}: mode {mode} "):
        ImageFiles([path], 8)[[0]]


def test_class_with_one_image_is_named(tmp_path, capsys):
    write_images(tmp_path, {"cat": 4, "dog": 4, "unicorn": 1})
    options = options_of(dataset=f"imagefolder:{tmp_path}", val_fraction=0.25, image_size=32)
    trainer_of(options, load_data(options))
    warning = capsys.readouterr().err
    assert "warning: class 'unicorn' has one training image" in warning
    assert "'cat'" not in warning and "'dog'" not in warning


@pytest.mark.parametrize("dataset", ["fashion_mnist", "imagefolder"])
def test_one_class_ends_with_one_line(tmp_path, capsys, dataset):
    if dataset == "imagefolder":
        write_images(tmp_path / "images", {"cat": 8})
        options = ("--dataset", f"imagefolder:{tmp_path / 'images'}", "--val_fraction", 0.25)
    else:
        write_fashion_mnist(tmp_path, packed=False, num_classes=1)
        options = ("--dataset", dataset, "--data_root", tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: pretrain(tmp_path / "runs", *options, "--batch_size", 4))
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "has one class alone" in error
    assert error.count("\n") == 1 and not list((tmp_path / "runs").iterdir())


def test_one_class_is_refused_unless_labels_are_not_used(tmp_path):
    write_images(tmp_path, {"cat": 8})
    config = options_of(dataset=f"imagefolder:{tmp_path}", val_fraction=0.25)
    with pytest.raises(UserError, match=r"one class alone, 'cat'.*--method simclr"):
        trainer_of(config, load_data(config))
    config = config.changed(method="simclr")
    assert len(trainer_of(config, load_data(config)).trained) > 0
