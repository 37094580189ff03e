"""What an embedding is worth on other images: k-NN and a linear classifier on another data set."""

import math
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from data.images import ImageData, Split
from evaluation.classification import rounded
from evaluation.knn import accuracy, knn_predict
from linear_stage.convex_fit import fit_convex
from linear_stage.features import Features


def transfer(embed_all: Callable[[Split], Tensor], data: ImageData) -> dict[str, float]:
    """Top-1 accuracies on a data set's test images, of classifiers of its training images.

    Args:
        embed_all: the (N, F) embeddings of a split.
    """
    train, test = (embed_all(split).float() for split in (data.train, data.test))
    num_classes = len(data.classes)
    labels = data.train.labels.to(train.device)
    neighbours = knn_predict(test, train, labels, num_classes=num_classes)
    features = Features(
        iter([(train, labels)]), len(train), device=train.device, limit=math.inf, folder=Path()
    )
    classifier, fit = fit_convex(features, num_classes)
    print(f"  transfer to {data.name}: linear classifier {fit}")
    linear = classifier.logits(test).argmax(1)
    return {
        "k-NN": rounded(accuracy(neighbours.cpu(), data.test.labels)),
        "linear": rounded(accuracy(linear.cpu(), data.test.labels)),
    }
