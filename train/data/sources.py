"""Where the images of each data set come from, which are held out, and what makes a set unfit."""

import gzip
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, STL10, FashionMNIST, VisionDataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.mnist import read_image_file, read_label_file

from data.folders import ClassFolders
from data.images import ImageData, ImageFiles, Split
from data.shards import NOT_FETCHED, read_index
from data.training_part import training_part
from run.errors import UserError
from run.rules import LARGEST, broken, out_of_range
from run.seeds import seed_of

DATASETS = ("digits", "fashion_mnist", "cifar10", "cifar100", "stl10")
# Held-out images belong to the data set, not to the run: every seed is measured on the same ones.
SPLIT_SEED = 0
# Tells the seeds of the validation part from others of the same run.
VALIDATION = 1
DIGITS_SIZE = 16
DIGITS_TEST_FRACTION = 0.25
FILES_SIZE = 64
DATA_ROOT = "data"
# What each of red, green and blue adds to grey (ITU-R 601-2, as Pillow has it).
LUMA = (0.299, 0.587, 0.114)

DataSet = TypeVar("DataSet", bound=VisionDataset)


@dataclass
class DataOptions:
    """The data set.

    Args:
        dataset: digits | fashion_mnist | cifar10 | cifar100 | stl10 | imagefolder:PATH |
            webdataset:URL. stl10: the labelled images. PATH has train/ and val/ with a folder per
            class, or only class folders (see val_fraction). URL names tar shards, such as
            DATA/train-{000..127}.tar. It is a path, or anything that webdataset opens (https:, gs:,
            pipe:COMMAND). Each sample has an image (jpg, jpeg, png or webp) and a label (cls, an
            integer as text).
        data_root: Folder of fashion_mnist, cifar and stl10, which are downloaded if missing, and of
            copies of remote shards. Default: data.
        image_size: Side of the encoder's images, in pixels. Default: that of the data set
            (digits: 16); imagefolder, webdataset: 64.
        val_fraction: Share of every class to hold out as test images, for imagefolder without val/
            and webdataset without val_shards.
        val_shards: URL of the test shards, for webdataset.
        validation_fraction: Share of every class to hold out of the training images, drawn by the
            seed. k-NN during the run is then measured on these, and chooses best.pt. The test images
            are used once, at the end. A class with one image is not split. Default: none; k-NN is
            measured on the test images, and chooses nothing.
        train_images: Number of images of a stratified part to train on, drawn by the seed. Default:
            all.
        label_noise: Share of the training images that get the label of another class, drawn by the
            seed. Labels of test and validation images are not changed. Default: none.
        imbalance: Make the training classes a long tail: the first class is so many times as large as
            the last, and sizes fall exponentially (LDAM). Default: classes are not changed.
        in_chans: Input channels of the network. 1 converts colour images to grey; 3 repeats grey
            images. Default: those of the data set; imagefolder, webdataset: 3.
        mean: Mean of each channel for pixels in [0, 1], such as [0.5]. Default: that of the
            training images; imagefolder, webdataset: that of ImageNet.
        std: Standard deviation of each channel. Default: as for mean.
    """

    dataset: str = "digits"
    data_root: str | None = None
    image_size: int | None = None
    val_fraction: float | None = None
    val_shards: str | None = None
    validation_fraction: float | None = None
    train_images: int | None = None
    label_noise: float | None = None
    imbalance: float | None = None
    in_chans: Literal[1, 3] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None

    def mistakes(self) -> list[str]:
        """What is out of range or contradicts itself, one sentence each."""
        kind, _, place = self.dataset.partition(":")
        in_files = kind in ("imagefolder", "webdataset") and place != ""
        rules = [
            (
                self.dataset in DATASETS or in_files,
                f"--dataset {self.dataset}: accepted are {', '.join(DATASETS)}, imagefolder:PATH, "
                "webdataset:URL",
            ),
            (
                self.data_root is None or kind not in ("digits", "imagefolder"),
                f"--data_root contradicts --dataset {self.dataset}, which is not looked for there",
            ),
            (
                self.val_fraction is None or in_files,
                f"--val_fraction contradicts --dataset {self.dataset}, which has a test split",
            ),
            (
                self.val_shards is None or kind == "webdataset",
                f"--val_shards contradicts --dataset {self.dataset}, which has none",
            ),
            (
                kind != "webdataset" or (self.val_fraction is None) != (self.val_shards is None),
                f"--dataset {self.dataset} needs --val_shards URL, or --val_fraction to hold images "
                "out, and not both",
            ),
            (
                self.std is None or min(self.std, default=0) > 0,
                f"--std {self.std}: must be greater than 0",
            ),
        ]
        return broken(rules) + out_of_range(
            self,
            at_least={"image_size": 8, "train_images": 1, "imbalance": 1},
            at_most={"image_size": LARGEST},
            between_0_and_1=("val_fraction", "validation_fraction", "label_noise"),
        )


def load_data(options: DataOptions, *, seed: int = 0, fetch: bool = True) -> ImageData:
    """Load the data set that the options name.

    Args:
        seed: draws the images of `validation_fraction`, and what is changed of the training set.
        fetch: run the commands, open the URLs and download the data sets that it names; else what
            is not in files here is refused, as for a options that came in a checkpoint.

    Raises:
        UserError: it is missing, unreadable or unfit; says what, where and the remedy.
    """
    if ":" in options.dataset:
        data = _in_files(options, seed, fetch)
    else:
        readers: dict[str, Callable[[Path, bool], tuple[Split, Split, list[str]]]] = {
            "digits": lambda root, fetch: _digits(),
            "fashion_mnist": _fashion_mnist,
            "cifar10": partial(_cifar, CIFAR10),
            "cifar100": partial(_cifar, CIFAR100),
            "stl10": _stl10,
        }
        train, test, classes = readers[options.dataset](Path(options.data_root or DATA_ROOT), fetch)
        data = _in_memory(train, test, classes, options, seed)
    data = replace(
        data, name=options.dataset, mean=options.mean or data.mean, std=options.std or data.std
    )
    for option, values in (("mean", data.mean), ("std", data.std)):
        if len(values) != data.channels:
            raise UserError(f"--{option} {values}: the images have {data.channels} channels")
    return data


def stratified_split(
    labels: Tensor, fraction: float, *, seed: tuple[int, ...] = (SPLIT_SEED,)
) -> tuple[list[int], list[int]]:
    """Divide (N,) labels into the indices that stay and those held out.

    Of a class with two samples or more at least one is held out and at least one stays; a single
    one stays. Which ones is a pure function of the arguments.
    """
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        generator = torch.Generator().manual_seed(seed_of(*seed, label))
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        held_out[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return (~held_out).nonzero().flatten().tolist(), held_out.nonzero().flatten().tolist()


def subset(split: Split, count: int) -> Split:
    """Up to `count` images, evenly drawn and always the same ones; all of them for 0."""
    if count == 0 or count >= len(split):
        return split
    return split.take(evenly_drawn(len(split), count))


def evenly_drawn(num_images: int, count: int) -> list[int]:
    """The indices of up to `count` images, evenly drawn and always the same ones."""
    generator = torch.Generator().manual_seed(seed_of(SPLIT_SEED))
    return torch.randperm(num_images, generator=generator)[:count].tolist()


def _digits() -> tuple[Split, Split, list[str]]:
    # Imported where it is needed: it takes a second.
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # 8x8 in 17 grey levels; upsampled here, so that views are cut from a smooth image.
    images = torch.from_numpy(bunch.images).float()[:, None] * (255 / 16)
    images = F.interpolate(images, (DIGITS_SIZE, DIGITS_SIZE), mode="bilinear")
    whole = Split(images.round().to(torch.uint8), torch.from_numpy(bunch.target).long())
    train, test = stratified_split(whole.labels, DIGITS_TEST_FRACTION)
    return whole.take(train), whole.take(test), [str(name) for name in bunch.target_names]


def _fashion_mnist(root: Path, fetch: bool) -> tuple[Split, Split, list[str]]:
    """torchvision's folders under `root`, or the four idx files, .gz or not, in `root` itself."""
    flat = [_find_idx(root, prefix) for prefix in ("train", "t10k")]
    if all(flat):
        train, test = (Split(*_read_idx(*files)) for files in flat if files)
        return train, test, list(FashionMNIST.classes)
    wanted = "four idx files (Debian: package dataset-fashion-mnist)"
    train, test = (
        Split(half.data[:, None], half.targets.long())
        for half in (
            _of_torchvision(FashionMNIST, root, wanted, fetch, train=True),
            FashionMNIST(root, train=False),
        )
    )
    return train, test, list(FashionMNIST.classes)


def _find_idx(root: Path, prefix: str) -> tuple[Path, Path] | None:
    found = [
        next((p for p in (root / name, root / f"{name}.gz") if p.is_file()), None)
        for name in (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    ]
    return (found[0], found[1]) if found[0] and found[1] else None


def _read_idx(image_file: Path, label_file: Path) -> tuple[Tensor, Tensor]:
    images = _unpacked(image_file, read_image_file)[:, None]
    labels = _unpacked(label_file, read_label_file)
    if len(images) != len(labels):
        raise UserError(
            f"{image_file} holds {len(images)} images, {label_file} {len(labels)} labels"
        )
    return images, labels


def _unpacked(path: Path, read: Callable[[str], Tensor]) -> Tensor:
    # torchvision's reader takes file names alone; the data folder may be read-only.
    try:
        if path.suffix != ".gz":
            return read(str(path))
        with tempfile.NamedTemporaryFile() as plain, gzip.open(path) as packed:
            shutil.copyfileobj(packed, plain)
            plain.flush()
            return read(plain.name)
    except (OSError, EOFError, ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _cifar(kind: type[CIFAR10], root: Path, fetch: bool) -> tuple[Split, Split, list[str]]:
    train = _of_torchvision(kind, root, f"folder {kind.base_folder}", fetch, train=True)
    splits = [
        Split(torch.from_numpy(half.data).permute(0, 3, 1, 2), torch.tensor(half.targets))
        for half in (train, kind(root, train=False))
    ]
    return splits[0], splits[1], list(train.classes)


def _stl10(root: Path, fetch: bool) -> tuple[Split, Split, list[str]]:
    """The labelled images alone: the 100,000 others have no class to be evaluated by."""
    train = _of_torchvision(STL10, root, f"folder {STL10.base_folder}", fetch, split="train")
    splits = [
        Split(torch.from_numpy(half.data).contiguous(), torch.from_numpy(half.labels).long())
        for half in (train, STL10(root, split="test"))
    ]
    return splits[0], splits[1], list(train.classes)


def _of_torchvision(
    kind: type[DataSet], root: Path, wanted: str, fetch: bool, **split: Any
) -> DataSet:
    """A split of a data set, which torchvision downloads, if it may, where it is not there yet."""
    try:
        found: DataSet = kind(root, download=fetch, **split)
        return found
    except Exception as error:
        if not fetch:
            raise UserError(
                f"{kind.__name__} was not found in {root.resolve()}; {NOT_FETCHED}"
            ) from error
        raise UserError(
            f"{kind.__name__} was not found in {root.resolve()} and could not be downloaded "
            f"({' '.join(str(error).split())}); put its {wanted} there or "
            "name another folder by --data_root"
        ) from error


def _in_memory(
    train: Split, test: Split, classes: list[str], options: DataOptions, seed: int
) -> ImageData:
    assert isinstance(train.images, Tensor)
    size = options.image_size or train.images.shape[-1]
    channels = options.in_chans or train.images.shape[1]
    fit = partial(_fit, size=size, channels=channels)
    whole = fit(train)
    if options.dataset == "stl10" and size < train.images.shape[-1]:
        # Crops are cut from images as they came; those of other data sets are no larger.
        whole = replace(whole, originals=_with_channels(train.images, channels))
    train, validation = _training_and_validation(whole, options, seed)
    assert isinstance(train.images, Tensor)
    mean, std = _mean_and_std(train.images)
    return ImageData(train, fit(test), classes, size, channels, mean, std, validation)


def _fit(split: Split, *, size: int, channels: int) -> Split:
    assert isinstance(split.images, Tensor)
    return Split(_with_channels(_resize(split.images, size), channels), split.labels)


def _resize(images: Tensor, size: int) -> Tensor:
    if images.shape[-2:] == (size, size):
        return images
    parts = [
        F.interpolate(part.float(), (size, size), mode="bilinear", antialias=True)
        for part in images.split(4096)
    ]
    return torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in parts])


def _with_channels(images: Tensor, channels: int) -> Tensor:
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1)
    weights = torch.tensor(LUMA).view(3, 1, 1)
    parts = [(part * weights).sum(1, keepdim=True) for part in images.split(4096)]
    return torch.cat([part.round().to(torch.uint8) for part in parts])


def _mean_and_std(images: Tensor) -> tuple[list[float], list[float]]:
    # From the histogram of byte values: exact, without a float copy of the set.
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = (share * values).sum()
        means.append(float(mean))
        stds.append(float((share * (values - mean) ** 2).sum().sqrt()))
    return means, stds


def _in_files(options: DataOptions, seed: int, fetch: bool) -> ImageData:
    kind, _, place = options.dataset.partition(":")
    size = options.image_size or FILES_SIZE
    channels = options.in_chans or 3
    # Decoded an eighth larger than the network sees, so that crops need not be scaled up.
    stored = size * 8 // 7
    read = _image_folder if kind == "imagefolder" else partial(_web_dataset, fetch=fetch)
    train, test, classes = read(place, options, stored, channels)
    mean, std = list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
    if channels == 1:
        # Of ImageNet in grey, as if its channels moved together.
        mean, std = ([sum(w * v for w, v in zip(LUMA, values))] for values in (mean, std))
    train, validation = _training_and_validation(train, options, seed)
    return ImageData(train, test, classes, size, channels, mean, std, validation)


def _image_folder(
    place: str, options: DataOptions, size: int, channels: int
) -> tuple[Split, Split, list[str]]:
    root = Path(place)
    if not root.is_dir():
        raise UserError(f"imagefolder: there is no folder {root.resolve()}")
    if (root / "val").is_dir():
        if options.val_fraction is not None:
            raise UserError(f"--val_fraction contradicts {root / 'val'}, which is there")
        train, classes = _read_folder(root / "train", size, channels)
        test, test_classes = _read_folder(root / "val", size, channels)
        if classes != test_classes:
            odd = ", ".join(sorted(set(classes) ^ set(test_classes)))
            raise UserError(f"{root}: train/ and val/ differ in the classes {odd}")
        return train, test, classes
    if options.val_fraction is None:
        raise UserError(f"{root} has no val/ folder: hold images out by --val_fraction 0.1")
    folder = root / "train" if (root / "train").is_dir() else root
    whole, classes = _read_folder(folder, size, channels)
    return *_hold_out(whole, options), classes


def _web_dataset(
    urls: str, options: DataOptions, size: int, channels: int, *, fetch: bool
) -> tuple[Split, Split, list[str]]:
    root = Path(options.data_root or DATA_ROOT)
    parts = [
        read_index(part, root=root, fetch=fetch)
        for part in (urls, options.val_shards)
        if part is not None
    ]
    # Any integers are labels; a class is the place of its label among those to train on.
    names = sorted(set(parts[0][1]))
    if unknown := sorted(set(parts[-1][1]) - set(names)):
        raise UserError(f"--val_shards {options.val_shards}: labels {unknown} are not in {urls}")
    classes = {name: number for number, name in enumerate(names)}
    splits = [
        Split(ImageFiles(files, size, channels), torch.tensor([classes[name] for name in labels]))
        for files, labels in parts
    ]
    train, test = splits if options.val_shards is not None else _hold_out(splits[0], options)
    return train, test, [str(name) for name in names]


def _hold_out(whole: Split, options: DataOptions) -> tuple[Split, Split]:
    assert options.val_fraction is not None
    stay, held_out = stratified_split(whole.labels, options.val_fraction)
    if not held_out:
        raise UserError(f"{options.dataset}: no class has an image to spare for --val_fraction")
    return whole.take(stay), whole.take(held_out)


def _training_and_validation(
    train: Split, options: DataOptions, seed: int
) -> tuple[Split, Split | None]:
    """The images to train on, and those to choose by, which are held out first."""
    train, validation = _hold_out_validation(train, options, seed)
    part = training_part(
        train,
        imbalance=options.imbalance,
        train_images=options.train_images,
        label_noise=options.label_noise,
        seed=seed,
    )
    return part, validation


def _hold_out_validation(
    train: Split, options: DataOptions, seed: int
) -> tuple[Split, Split | None]:
    if options.validation_fraction is None:
        return train, None
    # Unlike the test images these belong to the run: another seed chooses by others.
    stay, held_out = stratified_split(
        train.labels, options.validation_fraction, seed=(seed, VALIDATION)
    )
    if not held_out:
        raise UserError(
            f"--validation_fraction {options.validation_fraction}: no class of {options.dataset} has "
            "two training images, of which one could be held out"
        )
    return train.take(stay), train.take(held_out)


def _read_folder(folder: Path, size: int, channels: int) -> tuple[Split, list[str]]:
    try:
        found = ClassFolders(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        types = " ".join(IMG_EXTENSIONS)
        raise UserError(
            f"imagefolder {folder}: {error} Each class is a folder of images ({types})"
        ) from error
    images = ImageFiles([path for path, _ in found.samples], size, channels)
    return Split(images, torch.tensor(found.targets)), found.classes
