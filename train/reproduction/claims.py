"""What the paper claims, each claim once, and the scales at which it can be tested.

Khosla et al., Supervised Contrastive Learning, arXiv 2004.11362. A claim says which of two methods is the
better one. The methods differ in their loss alone: everything else is the scale's.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
# Baselines that learn nothing, by a linear classifier: they stand beside every table.
RAW_PIXELS, UNTRAINED = "raw_pixels", "untrained"
# The run that errors under corruptions are relative to.
REFERENCE = "cross_entropy"
SUPCON = "supcon"
# Of each metric: its title, and whether more is better. All are shares, shown in percent.
METRICS = {"top1": ("top-1", True), "ece": ("ECE", False), "mce": ("mCE", False)}


@dataclass(frozen=True)
class Compared:
    """A method as it is compared.

    Attributes:
        options: of pretrain.py.
        epochs: how many times as many as the scale says.
        of: the method whose learning rate it has, if it is not tuned itself.
    """

    title: str
    options: dict[str, Any]
    epochs: int = 1
    of: str | None = None


def _under(condition: str) -> dict[str, Compared]:
    """SupCon and cross-entropy under a condition, with the learning rates of without."""
    title, options = CONDITIONS[condition]
    return {
        f"{of}_{condition}": Compared(
            f"{METHODS[of].title}, {title}", METHODS[of].options | options, METHODS[of].epochs, of
        )
        for of in SUPERVISED
    }


# Another view is another pass through the network: with twice the epochs cross-entropy computes as much
# as a method of two views.
METHODS = {
    "supcon": Compared("SupCon", {"method": "supcon"}),
    "cross_entropy": Compared("Cross-entropy, equal epochs", {"method": "cross_entropy"}),
    "cross_entropy_2x": Compared("Cross-entropy, equal compute", {"method": "cross_entropy"}, 2),
    "simclr": Compared("SimCLR", {"method": "simclr"}),
    "max_margin": Compared("Max-margin", {"method": "max_margin"}),
    "n_pairs": Compared("N-pairs", {"method": "n_pairs"}),
    "triplet": Compared("Triplet", {"method": "triplet"}),
    "joint": Compared("Cross-entropy + SupCon", {"method": "joint"}),
    "supcon_in": Compared("SupCon, L_in", {"method": "supcon", "summation": "in"}),
    "sincere": Compared("SINCERE", {"method": "supcon", "denominator": "one_positive"}),
    "dcl": Compared("DCL", {"method": "supcon", "denominator": "only_negatives"}),
    "small_batch": Compared("SupCon, batch 32", {"method": "supcon", "batch_size": 32}),
    "small_batch_queue": Compared(
        "SupCon, batch 32, queue and momentum encoder",
        {"method": "supcon", "batch_size": 32, "queue_size": 2048, "queue_momentum": 0.99},
    ),
}
SUPERVISED = ("supcon", "cross_entropy", "cross_entropy_2x")
# Beyond the paper: of each condition its title and its options.
CONDITIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "noise": ("40% wrong labels", {"label_noise": 0.4}),
    "tail": ("long tail of 1:50", {"imbalance": 50}),
    "few": ("500 images", {"train_images": 500}),
}
for _condition in CONDITIONS:
    METHODS |= _under(_condition)


@dataclass(frozen=True)
class Claim:
    """That one method is better than another, by the metric of its table.

    Attributes:
        is_papers: whether the paper claims it; else it is a question of ours.
    """

    better: str
    worse: str
    is_papers: bool = True


@dataclass(frozen=True)
class Table:
    """A table or figure of the paper, or one of ours.

    Attributes:
        methods: its rows, in the order of METHODS.
        claims: the most telling first.
        published: the paper's numbers in percent, by method and data set (ImageNet: ResNet-50).
    """

    title: str
    methods: tuple[str, ...]
    claims: tuple[Claim, ...]
    metric: str = "top1"
    published: dict[str, dict[str, float]] = field(default_factory=dict)


def _pays(condition: str) -> Table:
    names = tuple(f"{of}_{condition}" for of in SUPERVISED)
    claims = tuple(Claim(names[0], other, is_papers=False) for other in names[1:])
    return Table(f"Beyond the paper: {CONDITIONS[condition][0]}", names, claims)


# In the order in which they are run: what settles most comes first.
TABLES = {
    "2": Table(
        "Table 2: losses",
        (
            "supcon", "cross_entropy", "cross_entropy_2x", "simclr", "max_margin",
            "n_pairs", "triplet", "joint",
        ),
        (
            Claim("supcon", "cross_entropy"),
            Claim("supcon", "cross_entropy_2x", is_papers=False),
            Claim("supcon", "simclr"),
            Claim("supcon", "max_margin"),
            Claim("supcon", "n_pairs", is_papers=False),
            Claim("supcon", "triplet", is_papers=False),
            Claim("supcon", "joint", is_papers=False),
        ),
        published={
            "supcon": {"CIFAR-10": 96.0, "CIFAR-100": 76.5, "ImageNet": 78.7},
            "cross_entropy": {"CIFAR-10": 95.0, "CIFAR-100": 75.3, "ImageNet": 78.2},
            "simclr": {"CIFAR-10": 93.6, "CIFAR-100": 70.7, "ImageNet": 70.2},
            "max_margin": {"CIFAR-10": 92.4, "CIFAR-100": 70.5, "ImageNet": 78.0},
        },
    ),
    "1": Table(
        "Table 1: where the sum over positives stands",
        ("supcon", "supcon_in", "sincere", "dcl"),
        (
            Claim("supcon", "supcon_in"),
            Claim("supcon", "sincere", is_papers=False),
            Claim("supcon", "dcl", is_papers=False),
        ),
        published={"supcon": {"ImageNet": 78.7}, "supcon_in": {"ImageNet": 67.4}},
    ),
    "6": Table(
        "Table 6: calibration",
        SUPERVISED,
        (Claim("supcon", "cross_entropy"), Claim("supcon", "cross_entropy_2x", is_papers=False)),
        metric="ece",
    ),
    "7": Table(
        "Table 7: corruptions",
        SUPERVISED,
        (Claim("supcon", "cross_entropy"), Claim("supcon", "cross_entropy_2x", is_papers=False)),
        metric="mce",
    ),
    "memory": Table(
        "Memory: a queue and a momentum encoder at a small batch",
        ("small_batch", "small_batch_queue"),
        (Claim("small_batch_queue", "small_batch", is_papers=False),),
    ),
    **{condition: _pays(condition) for condition in CONDITIONS},
}  # fmt: skip
# Of the paper, and not among them: what is missing for it.
NOT_COVERED = {
    "Table 5, number of positives": "the driver has no option that limits the positives",
    "Tables 3 and 4, architectures and transfer": "need ImageNet",
    "Tables 8 and 9, optimisers and augmentations": "not written yet",
    "Figure 4, hyperparameters": "not written yet",
}


@dataclass(frozen=True)
class Scale:
    """The data set, the network and the training of all runs.

    Attributes:
        recipe: a file of train/recipes that `options` change.
        trial_epochs: of a run that tries a learning rate.
        linear: a file of train/recipes/linear; without it the linear stage is the convex one.
        corruption_images: test images that are corrupted; 0: all.
    """

    recipe: str
    options: dict[str, Any]
    trial_epochs: int
    linear: str | None = None
    corruption_images: int = 0


SCALES = {
    "digits": Scale("digits.yaml", {}, 12),
    "fmnist10k": Scale(
        "fashion_mnist.yaml",
        {
            "train_images": 10_000, "image_size": 16, "width": 16, "batch_size": 128,
            "epochs": 30, "warmup_epochs": 4, "knn_every": 0,
        },
        6,
        corruption_images=1000,
    ),
    "fmnist": Scale("fashion_mnist.yaml", {"width": 64, "precision": "bf16", "knn_every": 0}, 10),
    "cifar10": Scale("cifar10.yaml", {}, 50, "cifar10.yaml"),
    "imagenet": Scale("imagenet_rn50.yaml", {}, 20, "imagenet_rn50.yaml"),
}  # fmt: skip
