"""What a run says of itself at its start and at its end: lines, pictures and results.json."""

import json
from pathlib import Path

import torch

from data.images import ImageData
from evaluation.evaluator import Tested
from evaluation.pictures import (
    PICTURES,
    draw_confusion,
    draw_curves,
    draw_embedding,
    fonts_for,
)
from network.weights import ENCODER, EXPORT
from run import next_steps
from run.atomic_write import replace_text
from run.checkpoint import LAST, RunState
from run.loggers import LogOptions


def describe(folder: Path, data: ImageData, device: torch.device, state: RunState) -> str:
    """A few words on a run that begins or goes on."""
    verb = f"resuming after step {state.step} in" if state.step else "writing to"
    held_out = "" if data.validation is None else f", {len(data.validation)} validation"
    return (
        f"{len(data.train)} training{held_out} and {len(data.test)} test images of "
        f"{len(data.classes)} classes, {data.channels}x{data.image_size}x{data.image_size}, on "
        f"{device.type}; {verb} {folder}\n"
        f"baselines on {watched(data)} images: k-NN of raw pixels {state.raw_pixels:.2%}, "
        f"of the untrained encoder {state.untrained:.2%}"
    )


def watched(data: ImageData) -> str:
    """What the images are called that k-NN is measured on during a run."""
    return "test" if data.validation is None else "validation"


def draw(
    folder: Path, data: ImageData, state: RunState, tested: Tested, logging: LogOptions
) -> None:
    """Draw the curves of a run, how it embeds test images, and which classes k-NN confuses."""
    with fonts_for([folder.name, *data.classes]) as fit:
        name, classes = fit(folder.name), [fit(name) for name in data.classes]
        title = f"{name}: test images, k-NN {tested.knn_accuracy:.2%}"
        points = tested.embeddings, tested.labels
        draw_embedding(*points, classes, folder / "embedding.png", title)
        labels = data.test.labels
        draw_confusion(tested.predictions, labels, classes, folder / "confusion.png", title)
        if "csv" in logging.chosen:
            curves = folder / "curves.png"
            draw_curves(folder / "metrics.csv", curves, name, state, images=watched(data))


def write_results(
    folder: Path, data: ImageData, state: RunState, tested: Tested, learned: dict[str, float]
) -> None:
    """Write the numbers, with those that the method has learned, and print them."""
    numbers = {
        "evaluated_on": watched(data),
        "knn_accuracy": state.accuracy,
        "knn_raw_pixels": state.raw_pixels,
        "knn_untrained": state.untrained,
        "probe_accuracy": state.probe,
        "test_knn_accuracy": tested.knn_accuracy,
        "test_probe_accuracy": tested.probe_accuracy,
        "epochs": state.epoch,
        "steps": state.step,
        "skipped_steps": state.skipped,
        **learned,
    }
    numbers = {name: value for name, value in numbers.items() if value is not None}
    replace_text(folder / "results.json", json.dumps(numbers, indent=2) + "\n")
    validation = ""
    if data.validation is not None:
        validation = f"k-NN {state.accuracy:.2%} on {len(data.validation)} validation images\n"
    print(
        f"{validation}"
        f"k-NN {tested.knn_accuracy:.2%} on {len(data.test)} test images\n"
        f"baselines on {watched(data)} images: raw pixels {state.raw_pixels:.2%}, untrained "
        f"encoder {state.untrained:.2%}"
    )


def say_what_is_next(folder: Path, dataset: str) -> None:
    """Print where everything is, and the commands that use it."""
    files = {
        "checkpoint": [LAST],
        "encoder": [ENCODER, EXPORT],
        "pictures": PICTURES,
        "numbers": ["results.json", "metrics.csv"],
    }
    print(f"files in {folder}:")
    for what, names in files.items():
        there = [name for name in names if (folder / name).exists()]
        if there:
            print(f"  {what:10}  {'  '.join(there)}")
    following = next_steps.linear(folder), next_steps.embed(folder, dataset)
    print(next_steps.lines(*following), flush=True)
