"""The options of the methods, and which method reads which."""

from dataclasses import dataclass
from typing import Literal

from run.rules import LARGEST, broken, out_of_range

# Do not look at the labels.
WITHOUT_LABELS = ("simclr", "moco", "cmc")
WITH_CLASSIFIER = ("cross_entropy", "joint", "max_margin")
# Learn from one view of an image; of the others cmc can, too.
ONE_VIEW = ("cross_entropy", "max_margin")
CONTRASTIVE = ("supcon", "simclr", "moco", "joint", "cmc")
# Of each option that not every method reads, those that do.
READ_BY = {
    "temperature": CONTRASTIVE,
    "base_temperature": CONTRASTIVE,
    "learn_temperature": CONTRASTIVE,
    "summation": CONTRASTIVE,
    "denominator": CONTRASTIVE,
    "max_positives": ("supcon", "joint"),
    "queue_size": ("supcon", "moco"),
    "queue_momentum": ("supcon", "moco"),
    "label_smoothing": ("cross_entropy", "joint"),
    "contrast_weight": ("joint",),
    "margin": ("triplet", "max_margin"),
}
MOCO_QUEUE_SIZE = 4096
MARGINS = {"triplet": 0.2, "max_margin": 4.0}


@dataclass
class MethodOptions:
    """The method: its loss.

    Args:
        method: supcon: images of one class attract each other. simclr: only the views of one image
            do; labels are not used. moco: simclr with a queue of keys from a momentum encoder.
            cross_entropy: a linear classifier on the embedding. joint: cross_entropy plus supcon.
            n_pairs: N-pair loss. triplet: triplet loss with semi-hard negatives. max_margin:
            large-margin softmax. cmc: two encoders see two kinds of view of an image. n_pairs,
            triplet and max_margin need pytorch-metric-learning.
        temperature: Temperature of the contrastive loss.
        base_temperature: Multiply the loss by temperature / base_temperature, so that the size of a step
            does not depend on the temperature. The SupCon authors' code uses 1, SupContrast 0.07.
            Default: do not multiply.
        learn_temperature: Train the temperature, starting from the one given. It stays above 0.01, and
            its last value is in results.json.
        summation: out: average the log-probabilities of the positives (equation 2 of the SupCon
            paper). in: take the logarithm of the average probability (equation 3).
        denominator: Terms in the denominator of a positive. all: every other view (the SupCon
            paper). one_positive: the positive and the negatives (SINCERE). only_negatives: DCL.
        max_positives: Largest number of positives of a view, the other views of its image among them: with
            two views 1, 3, 5 and so on. Further images of its class are neither positives nor in the
            denominator. Needs one process. Default: all.
        queue_size: Number of keys in a queue, such as 8192. The first view of each image is compared
            with them. Keys are the other views of the images of this and earlier steps. A momentum
            encoder embeds them without gradient. Default: moco 4096; supcon no queue.
        queue_momentum: Share of the momentum encoder's weights that a step keeps.
        label_smoothing: Label smoothing of the cross-entropy.
        contrast_weight: joint: weight of the supcon loss, which is added to the cross-entropy.
        margin: triplet: by how much a negative must be farther than a positive. Default: 0.2.
            max_margin: an integer that multiplies the angle to the image's own class. Default: 4.
    """

    method: Literal[
        "supcon", "simclr", "moco", "cross_entropy", "joint",
        "n_pairs", "triplet", "max_margin", "cmc",
    ] = "supcon"  # fmt: skip
    temperature: float = 0.1
    base_temperature: float | None = None
    learn_temperature: bool = False
    summation: Literal["out", "in"] = "out"
    denominator: Literal["all", "one_positive", "only_negatives"] = "all"
    max_positives: int | None = None
    queue_size: int | None = None
    queue_momentum: float = 0.999
    label_smoothing: float = 0.0
    contrast_weight: float = 0.5
    margin: float | None = None

    def __post_init__(self) -> None:
        # So was moco called before it had a name; checkpoints and config.yaml of then say so.
        if self.method == "simclr" and self.queue_size is not None:
            self.method = "moco"

    @property
    def uses_labels(self) -> bool:
        """Whether images of one class are treated alike."""
        return self.method not in WITHOUT_LABELS

    @property
    def default_views(self) -> int:
        """The views of an image where --num_views does not say."""
        return 1 if self.method in ONE_VIEW else 2

    @property
    def least_views(self) -> int:
        """The views of an image that it needs."""
        return 1 if self.method in (*ONE_VIEW, "cmc") else 2

    @property
    def num_keys(self) -> int | None:
        """What the queue holds, if there is one."""
        if self.queue_size is None and self.method == "moco":
            return MOCO_QUEUE_SIZE
        return self.queue_size

    @property
    def margin_or_default(self) -> float:
        """Of the methods that have one."""
        return self.margin or MARGINS[self.method]

    @property
    def scale(self) -> float:
        """What the contrastive loss is multiplied by."""
        return self.temperature / (self.base_temperature or self.temperature)

    def mistakes(self) -> list[str]:
        """What is out of range or contradicts itself, one sentence each."""
        unread = [
            (
                self.method in methods or getattr(self, name) == getattr(MethodOptions, name),
                f"--{name} contradicts --method {self.method}: it is for {', '.join(methods)}",
            )
            for name, methods in READ_BY.items()
        ]
        rules = [
            (
                self.num_keys is not None or self.queue_momentum == MethodOptions.queue_momentum,
                "--queue_momentum contradicts the absence of a queue: give --queue_size",
            ),
            (
                self.max_positives is None or self.queue_size is None,
                "--max_positives contradicts --queue_size: it is for the views of one step",
            ),
            (
                0 <= self.queue_momentum < 1,
                f"--queue_momentum {self.queue_momentum}: must be at least 0 and less than 1",
            ),
            (
                not self.learn_temperature or self.base_temperature is None,
                "--base_temperature contradicts --learn_temperature: the scale of the loss would "
                "be learned, too",
            ),
            (
                0 <= self.label_smoothing < 1,
                f"--label_smoothing {self.label_smoothing}: must be at least 0 and less than 1",
            ),
            (
                self.method != "max_margin" or float(self.margin or 1).is_integer(),
                f"--margin {self.margin}: must be an integer for --method max_margin",
            ),
        ]
        mistakes = broken(unread) or broken(rules)
        return mistakes + out_of_range(
            self,
            at_least={"max_positives": 1},
            at_most={"queue_size": LARGEST},
            greater_than_0=("temperature", "base_temperature", "contrast_weight", "margin"),
        )
