"""The page of pictures of an evaluated run: calibration, classes, corruptions."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data.corrupted import SEVERITIES
from evaluation.comparison import numbers_of, written
from evaluation.pictures import MAX_NAMED, fonts_for
from run.atomic_write import replace_file


def draw_page(results: dict[str, Any], picture: Path) -> None:
    """Draw what a run's JSON file holds."""
    classification = results["classification"]
    # Tests that were broken off have no mean.
    corruptions = results.get("corruptions", {})
    whole = "mean_top1" in corruptions
    with fonts_for([results["run"], *classification["per_class"]]) as fit:
        figure = Figure(figsize=(11, 10.5 if whole else 5.2), layout="constrained")
        axes = figure.subplots(2 if whole else 1, 2, squeeze=False)
        draw_reliability(axes[0, 0], classification)
        classes = {fit(name): share for name, share in classification["per_class"].items()}
        draw_classes(axes[0, 1], classes)
        if whole:
            draw_severities(axes[1, 0], corruptions)
            draw_corruptions(figure, axes[1, 1], corruptions)
        numbers = [
            f"{title} {written(title, number)}" for title, number in numbers_of(results).items()
        ]
        half = (len(numbers) + 1) // 2
        lines = ["   ".join(numbers[:half]), "   ".join(numbers[half:])]
        title = f"{fit(results['run'])}: {results['test_images']} test images"
        figure.suptitle("\n".join([title, *filter(None, lines)]), fontsize=10)
        replace_file(picture, lambda file: figure.savefig(file, dpi=150))


def draw_reliability(axes: Axes, classification: dict[str, Any]) -> None:
    """Draw accuracy over confidence; a bin's point is as large as it has images."""
    bins = classification["reliability"]
    confidence, accuracy, images = (
        np.array([one[name] for one in bins]) for name in ("confidence", "accuracy", "images")
    )
    axes.plot([0, 1], [0, 1], color="0.4", linestyle="--", linewidth=1, label="calibrated")
    axes.plot(confidence, accuracy, color="tab:blue", linewidth=1)
    axes.scatter(confidence, accuracy, s=10 + 300 * images / images.sum(), color="tab:blue")
    axes.set(
        title=f"reliability, ECE {classification['ece']:.2%}",
        xlabel="confidence",
        ylabel="accuracy",
        xlim=(0, 1.02),
        ylim=(0, 1.02),
    )
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left", frameon=False)


def draw_classes(axes: Axes, per_class: dict[str, float | None]) -> None:
    """Draw the accuracy of each class with images; of many classes sorted and without names."""
    percent = {name: 100 * share for name, share in per_class.items() if share is not None}
    if len(percent) <= MAX_NAMED:
        axes.barh(list(percent), list(percent.values()), color="tab:blue")
        axes.invert_yaxis()
        axes.set_xlabel("accuracy (%)")
        axes.set_xlim(0, 100)
    else:
        axes.plot(sorted(percent.values()))
        axes.set(xlabel="classes, the hardest first", ylabel="accuracy (%)", ylim=(0, 100))
    axes.set_title("accuracy by class")
    axes.grid(alpha=0.25)


def draw_severities(axes: Axes, corruptions: dict[str, Any]) -> None:
    """Draw accuracy over severity: of each corruption in grey, and their mean."""
    clean = corruptions["clean_top1"]

    def line(shares: dict[str, float], **how: Any) -> None:
        values = [clean, *(shares[str(severity)] for severity in SEVERITIES)]
        axes.plot([0, *SEVERITIES], [100 * value for value in values], **how)

    for shares in corruptions["top1"].values():
        line(shares, color="0.75", linewidth=0.8)
    line(corruptions["mean_top1_by_severity"], color="tab:blue", marker="o", label="mean")
    axes.set(
        title="accuracy by severity",
        xlabel="severity (0: not corrupted)",
        ylabel="accuracy (%)",
        ylim=(0, 100),
    )
    axes.grid(alpha=0.25)
    axes.legend(loc="lower left", frameon=False)


def draw_corruptions(figure: Figure, axes: Axes, corruptions: dict[str, Any]) -> None:
    """Draw the accuracy of each corruption at each severity in colours and numbers."""
    names = [name.replace("_", " ") for name in corruptions["top1"]]
    rows = [[row[str(severity)] for severity in SEVERITIES] for row in corruptions["top1"].values()]
    percent = 100 * np.array(rows)
    image = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    figure.colorbar(image, label="accuracy (%)", shrink=0.8)
    for (row, column), share in np.ndenumerate(percent):
        colour = "white" if share > 60 else "black"
        axes.text(column, row, f"{share:.0f}", ha="center", va="center", size=8, color=colour)
    axes.set_xticks(range(len(SEVERITIES)), map(str, SEVERITIES))
    axes.set_yticks(range(len(names)), names)
    axes.set(title="accuracy by corruption", xlabel="severity")
