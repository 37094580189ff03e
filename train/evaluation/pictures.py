"""The pictures of a run: its curves, a map of its embedding, and which classes it confuses."""

import csv
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps, rc_context
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager, get_font
from torch import Tensor

from run.atomic_write import replace_file
from run.checkpoint import RunState

PICTURES = ("curves.png", "embedding.png", "confusion.png")
# What a reader can still tell apart, and t-SNE embeds in seconds.
MAX_POINTS = 1000
# So many colours can be told apart, and so many names written along an axis.
MAX_NAMED = 20
# It comes with matplotlib.
FONT = "DejaVu Sans"


@contextmanager
def fonts_for(texts: Iterable[str]) -> Iterator[Callable[[str], str]]:
    """While entered, texts in any script are drawn in those fonts of this machine that have it.

    Yields:
        What makes one of the texts fit to draw: a character that no font has is escaped, as \\u732b.
    """
    families, missing = [], set("".join(texts))
    regular = [
        font for font in fontManager.ttflist if font.style == "normal" and font.weight == 400
    ]
    for font in sorted(regular, key=lambda font: font.name != FONT):
        # The last resort has a box for every character.
        if missing and "Last Resort" not in font.name:
            characters = get_font(font.fname).get_charmap()
            if found := {character for character in missing if ord(character) in characters}:
                families.append(font.name)
                missing -= found

    def fit(text: str) -> str:
        escaped = (
            character.encode("unicode_escape").decode() if character in missing else character
            for character in text
        )
        return "".join(escaped).replace("$", r"\$")  # which begins a formula

    with rc_context({"font.family": families or [FONT]}):
        yield fit


def draw_curves(
    metrics: Path, picture: Path, title: str, baselines: RunState, *, images: str = "test"
) -> None:
    """Draw loss and accuracies over steps, as metrics.csv has them of "test" or other `images`."""
    with open(metrics, newline="") as file:
        rows = list(csv.DictReader(file))

    def column(name: str, scale: float = 1.0) -> list[tuple[int, float]]:
        return [(int(row["step"]), scale * float(row[name])) for row in rows if row[name]]

    loss, knn, probe = column("loss"), column("knn_accuracy", 100), column("probe_accuracy", 100)
    if not knn:
        return  # --log csv was chosen only after the last step
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*zip(*loss), linewidth=1)
    left.set(title="loss", xlabel="step", ylabel="loss of the batch")
    right.plot(
        *zip(*knn),
        marker="o",
        markersize=4,
        label=f"k-NN, {knn[-1][1]:.2f} at the end",
    )
    if probe:
        right.plot(
            *zip(*probe), marker="s", markersize=3, label=f"linear probe, {probe[-1][1]:.2f}"
        )
    for share, style, name in (
        (baselines.raw_pixels, "--", "k-NN of raw pixels"),
        (baselines.untrained, ":", "k-NN of the untrained encoder"),
    ):
        label = f"{name}, {100 * share:.2f}"
        right.axhline(100 * share, color="0.4", linestyle=style, linewidth=1, label=label)
    right.set(title=f"accuracy on the {images} images", xlabel="step", ylabel="accuracy (%)")
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
    # Imported where it is needed: it takes a second.
    from sklearn.manifold import TSNE

    features = F.normalize(features, dim=1).cpu()
    map_ = np.zeros((len(features), 2))
    if len(features) > 1:
        perplexity = min(30.0, (len(features) - 1) / 3)
        tsne = TSNE(perplexity=perplexity, init="random", random_state=0)
        map_ = tsne.fit_transform(features.numpy())

    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    axes = figure.subplots()
    few = len(classes) <= MAX_NAMED
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


def draw_confusion(
    predictions: Tensor, labels: Tensor, classes: list[str], picture: Path, title: str
) -> None:
    """Draw of each class what share of its images, (N,) labels, has which (N,) prediction."""
    num_classes = len(classes)
    pairs = torch.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    counts = pairs.view(num_classes, num_classes).double()
    no_image = (counts.sum(1) == 0).tolist()
    percent = (100 * counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()

    named = num_classes <= MAX_NAMED
    side = max(5.0, 0.42 * num_classes) if named else 6.0
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    axes = figure.subplots()
    # By its square root a share of 2 % is not white.
    image = axes.imshow(percent, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    figure.colorbar(image, label="share of the true class (%)", shrink=0.8)
    axes.set(title=title, xlabel="k-NN prediction", ylabel="true class")
    if any(no_image) and not named:
        axes.set_ylabel(f"true class (without test images: {sum(no_image)})")
    if named:
        axes.set_xticks(
            range(num_classes), classes, rotation=45, ha="right", rotation_mode="anchor"
        )
        rows = [f"{name}\n(no test images)" if no else name for name, no in zip(classes, no_image)]
        axes.set_yticks(range(num_classes), rows)
        for (true, predicted), share in np.ndenumerate(percent):
            if share > 0:
                colour = "white" if share > 30 else "black"
                text = f"{share:.1f}" if share < 99.95 else "100"
                axes.text(predicted, true, text, ha="center", va="center", size=8, color=colour)
    replace_file(picture, lambda file: figure.savefig(file, dpi=150))
