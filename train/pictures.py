"""The two pictures of a run: its curves, and a map of how it embeds the test images."""

import csv
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch import Tensor

from checkpoint import RunState
from durable import replace_file

# What a reader can still tell apart, and t-SNE embeds in seconds.
MAX_POINTS = 1000


def draw_curves(metrics: Path, picture: Path, title: str, baselines: RunState) -> None:
    """Draw loss and k-NN accuracy over steps, as metrics.csv has them."""
    with open(metrics, newline="") as file:
        rows = list(csv.DictReader(file))
    loss = [(int(row["step"]), float(row["loss"])) for row in rows if row["loss"]]
    knn = [
        (int(row["step"]), 100 * float(row["knn_accuracy"])) for row in rows if row["knn_accuracy"]
    ]

    figure = Figure(figsize=(9, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*zip(*loss), linewidth=1)
    left.set(title="loss", xlabel="step", ylabel="loss of the batch")
    right.plot(
        *zip(*knn), marker="o", markersize=4, label=f"trained encoder, {knn[-1][1]:.2f} at the end"
    )
    for share, style, name in (
        (baselines.raw_pixels, "--", "raw pixels"),
        (baselines.untrained, ":", "untrained encoder"),
    ):
        label = f"{name}, {100 * share:.2f}"
        right.axhline(100 * share, color="0.4", linestyle=style, linewidth=1, label=label)
    right.set(title="k-NN on the test images", xlabel="step", ylabel="accuracy (%)")
    # Beside the axes: within them it would cross a curve that rises late.
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.suptitle(title)
    replace_file(picture, lambda file: figure.savefig(file, dpi=150))


def draw_embedding(
    features: Tensor, labels: Tensor, classes: list[str], picture: Path, title: str
) -> None:
    """Draw the t-SNE of L2-normalised (N, F) features, coloured by (N,) labels."""
    features = F.normalize(features, dim=1).cpu()
    map_ = TSNE(
        perplexity=min(30.0, (len(features) - 1) / 3), init="random", random_state=0
    ).fit_transform(features.numpy())

    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    axes = figure.subplots()
    few = len(classes) <= 20
    colours = colormaps["tab10" if len(classes) <= 10 else "tab20" if few else "hsv"]
    for label, name in enumerate(classes):
        points = map_[np.asarray(labels == label)]
        colour = colours(label if few else label / len(classes))
        axes.scatter(
            points[:, 0],
            points[:, 1],
            s=10,
            color=colour,
            label=name if few else None,
            linewidths=0,
        )
    axes.set(title=title, xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2")
    axes.set_aspect("equal", adjustable="datalim")
    if few:
        figure.legend(loc="outside right center", frameon=False, markerscale=2)
    replace_file(picture, lambda file: figure.savefig(file, dpi=150))
