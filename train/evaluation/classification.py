"""How good class scores are: accuracy, likelihood and calibration."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
)

# As Guo et al. (arXiv 1706.04599), who made the expected calibration error known.
BINS = 15


def classify(scores: Tensor, labels: Tensor, classes: list[str]) -> dict[str, Any]:
    """What JSON says of (N, C) class scores (logits) of images with (N,) labels.

    top-1 and top-5 accuracy, negative log-likelihood in nats, expected calibration error, the
    accuracy of each class (None without images), and the bins of the reliability diagram.
    """
    num_classes = len(classes)
    probabilities = scores.softmax(1)

    def accuracy(k: int, average: str) -> Tensor:
        result: Tensor = multiclass_accuracy(
            scores,
            labels,
            num_classes,
            top_k=min(k, num_classes),
            average=average,  # type: ignore[arg-type]
        )
        return result

    has_images = labels.bincount(minlength=num_classes) > 0
    by_class = zip(classes, accuracy(1, "none").tolist(), has_images.tolist())
    error = multiclass_calibration_error(probabilities, labels, num_classes, n_bins=BINS, norm="l1")
    return {
        "top1": rounded(accuracy(1, "micro")),
        "top5": rounded(accuracy(5, "micro")),
        "nll": rounded(F.cross_entropy(scores.double(), labels)),
        "ece": rounded(error),
        "per_class": {name: rounded(share) if there else None for name, share, there in by_class},
        "reliability": _reliability(probabilities, labels),
    }


def top1(scores: Tensor, labels: Tensor) -> float:
    """The share of (N, C) scores whose largest is that of the (N,) label."""
    return rounded((scores.argmax(1) == labels).double().mean())


def rounded(number: float | Tensor) -> float:
    """What is written of a number: a float32 share would be 0.6200000047683716."""
    return round(float(number), 6)


def _reliability(probabilities: Tensor, labels: Tensor) -> list[dict[str, float]]:
    """Of each bin of confidences that holds images: their number, mean confidence and accuracy."""
    confidence, predictions = probabilities.double().max(1)
    correct = (predictions == labels).double()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    return [
        {
            "images": int(inside.sum()),
            "confidence": rounded(confidence[inside].mean()),
            "accuracy": rounded(correct[inside].mean()),
        }
        for inside in (bins == number for number in range(BINS))
        if torch.any(inside)
    ]
