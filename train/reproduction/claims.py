"""What the paper claims, each claim once, and what we ask beyond it.

Khosla et al., Supervised Contrastive Learning, arXiv 2004.11362. A claim says which of two methods is the
better one.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import permutations, product

from reproduction.methods import (
    AUGMENTS,
    BATCHES,
    CONDITIONS,
    OPTIMIZERS,
    POSITIVES,
    RAW_PIXELS,
    REFERENCE,
    SETTINGS,
    SUPCON,
    SUPERVISED,
    TEMPERATURES,
    UNTRAINED,
)

SEVERITIES = {f"severity_{number}": f"top-1, severity {number}" for number in range(1, 6)}
SPREAD = "spread"
# Of each metric: its title, and whether more is better. All are shares, shown in percent.
METRICS = {
    "top1": ("top-1", True),
    "ece": ("ECE", False),
    "mce": ("mCE", False),
    "relative_mce": ("relative mCE", False),
    **{name: (title, True) for name, title in SEVERITIES.items()},
    SPREAD: ("spread of top-1 over settings", False),
}
# Those that evaluate.py measures on corrupted images.
CORRUPTED = ("mce", "relative_mce", *SEVERITIES)


@dataclass(frozen=True)
class Claim:
    """That one method is better than another, by a metric.

    Attributes:
        is_papers: whether the paper claims it; else it is a question of ours.
    """

    better: str
    worse: str
    is_papers: bool = True
    metric: str = "top1"


@dataclass(frozen=True)
class Table:
    """A table or figure of the paper, or one of ours.

    Attributes:
        methods: its rows.
        claims: the most telling first.
        columns: the metrics that it shows.
        published: the paper's top-1 in percent, by method and data set (ImageNet: ResNet-50).
        baselines: what stands beside its methods.
    """

    title: str
    methods: tuple[str, ...]
    claims: tuple[Claim, ...]
    columns: tuple[str, ...] = ("top1",)
    published: dict[str, dict[str, float]] = field(default_factory=dict)
    baselines: tuple[str, ...] = (RAW_PIXELS, UNTRAINED)

    @property
    def needs_corruptions(self) -> bool:
        """Whether its methods are to be tested on corrupted images."""
        return any(metric in CORRUPTED for metric in self.columns)


def _claims(
    better: str, papers: Iterable[str] = (), ours: Iterable[str] = (), metric: str = "top1"
) -> tuple[Claim, ...]:
    """That a method is better than some others, as the paper says and as we ask."""
    return (
        *(Claim(better, other, metric=metric) for other in papers),
        *(Claim(better, other, is_papers=False, metric=metric) for other in ours),
    )


def _pays(condition: str) -> Table:
    name, *others = (f"{of}_{condition}" for of in SUPERVISED)
    return Table(
        f"Beyond the paper: {CONDITIONS[condition][0]}",
        (name, *others),
        _claims(name, ours=others),
        baselines=(f"{RAW_PIXELS}_{condition}", f"{UNTRAINED}_{condition}"),
    )


EQUAL_COMPUTE, TWO_STAGES = "cross_entropy_2x", "cross_entropy_two_stages"
ROBUST = (*SUPERVISED, TWO_STAGES)
# For ImageNet, as the paper's section on training says; it found momentum better on CIFAR.
BEST_OPTIMIZERS = "lars_rmsprop"
OPTIMIZER_PAIRS = tuple(f"{first}_{second}" for first, second in product(OPTIMIZERS, repeat=2))
# Of ResNet-50, says the paper's Table 9: the same augmentation in both stages is best, except for the
# stacked one, which is worse than others.
STACKED = "stacked_randaugment"
SAME_AUGMENT = tuple(
    Claim(f"{first}_{first}", f"{first}_{second}", is_papers=augments is AUGMENTS[1])
    for augments in AUGMENTS
    for first, second in permutations(augments, 2)
    if first != STACKED
)
AUGMENT_PAIRS = tuple(
    dict.fromkeys(
        f"{first}_{second}"
        for augments in AUGMENTS
        for first, second in product(augments, repeat=2)
    )
)
WITHOUT_QUEUE = tuple(f"batch_{size}" for size in BATCHES)
WITH_QUEUE = tuple(f"{name}_queue" for name in WITHOUT_QUEUE)
# In the order in which they are run: what settles most comes first. The paper's numbers are those of
# its Tables 1 and 2, and of its text on a memory; others are left out.
TABLES = {
    "2": Table(
        "Table 2: losses",
        (
            "supcon", "cross_entropy", "cross_entropy_2x", "simclr", "max_margin",
            "n_pairs", "triplet", "joint",
        ),
        (
            Claim(SUPCON, REFERENCE),
            Claim(SUPCON, EQUAL_COMPUTE, is_papers=False),
            *_claims(SUPCON, ["simclr", "max_margin"], ["n_pairs", "triplet", "joint"]),
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
        _claims(SUPCON, ["supcon_in"], ["sincere", "dcl"]),
        published={"supcon": {"ImageNet": 78.7}, "supcon_in": {"ImageNet": 67.4}},
    ),
    "5": Table(
        "Table 5: number of positives", (*POSITIVES, SUPCON), _claims(SUPCON, POSITIVES)
    ),
    "6": Table(
        "Table 6: calibration, and cross-entropy in two stages",
        ROBUST,
        (
            *_claims(SUPCON, [REFERENCE], [EQUAL_COMPUTE, TWO_STAGES], "ece"),
            *_claims(SUPCON, [TWO_STAGES]),
        ),
        columns=("top1", "ece"),
    ),
    "7": Table(
        "Table 7: corruptions",
        ROBUST,
        (
            *_claims(SUPCON, [REFERENCE], [EQUAL_COMPUTE, TWO_STAGES], "mce"),
            *_claims(SUPCON, [REFERENCE], [EQUAL_COMPUTE, TWO_STAGES], "relative_mce"),
        ),
        columns=("mce", "relative_mce"),
    ),
    "figure 3": Table(
        "Figure 3: corruptions by severity",
        ROBUST,
        _claims(SUPCON, [REFERENCE], [EQUAL_COMPUTE, TWO_STAGES], "severity_5"),
        columns=("top1", *SEVERITIES),
    ),
    "memory": Table(
        "Memory: a queue and a momentum encoder (the paper's claim is for ImageNet)",
        (*WITH_QUEUE, *WITHOUT_QUEUE, SUPCON),
        (
            Claim("batch_256_queue", SUPCON),
            *(Claim(*pair, is_papers=False) for pair in zip(WITH_QUEUE, WITHOUT_QUEUE)),
        ),
        published={"supcon": {"ImageNet": 78.7}, "batch_256_queue": {"ImageNet": 79.1}},
    ),
    **{condition: _pays(condition) for condition in CONDITIONS},
    "figure 4": Table(
        "Figure 4: how much hyperparameters matter",
        tuple(
            name
            for of, settings in ((SUPCON, SETTINGS | TEMPERATURES), (REFERENCE, SETTINGS))
            for name in (f"{of}_{setting}" for setting in settings)
        ),
        _claims(SUPCON, [REFERENCE], metric=SPREAD),
    ),
    "8": Table(
        "Table 8: optimizers of both stages (the paper's claim is for ImageNet)",
        OPTIMIZER_PAIRS,
        _claims(BEST_OPTIMIZERS, [pair for pair in OPTIMIZER_PAIRS if pair != BEST_OPTIMIZERS]),
    ),
    "9": Table(
        "Table 9: augmentations of both stages",
        AUGMENT_PAIRS,
        (*SAME_AUGMENT, *_claims("autoaugment_autoaugment", [f"{STACKED}_{STACKED}"])),
    ),
}  # fmt: skip
FIGURES = tuple(name.removeprefix("figure ") for name in TABLES if name.startswith("figure "))
# Of the paper, and not among them: what is missing for it.
NOT_COVERED = {"Tables 3 and 4, architectures and transfer": "need ImageNet"}


def option_of(name: str) -> str:
    """What chooses a table or a figure on the command line."""
    return f"--{name}" if name.startswith("figure ") else f"--table {name}"
