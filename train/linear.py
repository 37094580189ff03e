"""Fit a linear classifier on the encoder of a run: the usual measure of its embedding.

python train/linear.py --checkpoint runs/NAME/last.pt
python train/linear.py --checkpoint runs/NAME --protocol paper --config train/recipes/linear/cifar10.yaml
python train/linear.py --checkpoint runs/NAME --protocol paper --finetune

By default each image is encoded once, without augmentation; the features are standardised and the
classifier is fitted by L-BFGS. The problem is convex, so there is no learning rate or schedule to
choose. --protocol paper trains the classifier on random views instead, as papers do.
"""

import run.quiet_interrupt  # noqa: F401  before all that takes long to import

# isort: split

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.images import ImageData
from data.sources import load_data
from linear_stage.classifier import save_classifier
from linear_stage.options import LinearOptions
from linear_stage.stage import Found, LinearStage
from run import next_steps
from run.atomic_write import replace_text
from run.command_line import parse, run_script
from run.device import pick_device, set_arithmetic
from run.errors import UserError
from run.saved_run import SavedRun, open_run

DESCRIPTION = (__doc__ or "").split("\n", 1)[0]


def main(argv: list[str] | None = None) -> float:
    """Run what the command line asks for; returns the top-1 accuracy on the test images."""
    options = parse(LinearOptions, argv, prog="train/linear.py", description=DESCRIPTION)
    return linear(options)


def linear(options: LinearOptions) -> float:
    """Fit on the training images of a run, measure on its test images, write both to its folder."""
    run = open_run(Path(options.stage.checkpoint))
    with writing_to(run.path.parent) as folder, tempfile.TemporaryFile(dir=folder):
        pass  # before what takes long
    device = pick_device(options.stage.device)
    set_arithmetic(run.options.device, device)
    stage = LinearStage(options, run, images_of(run, options), device)
    model = run.network().to(device)
    found = stage.train(model) if options.stage.protocol == "paper" else stage.fit(model)
    # Once, after everything is chosen.
    [accuracy] = stage.measure(found.model, [found.classifier], stage.data.test)
    results = {"top1": accuracy.top1, "top5": accuracy.top5, **found.about}
    results |= {"epochs": run.state.epoch, "protocol": options.stage.protocol}
    write(run, found, results)
    say(results, found, num_images=len(stage.data.test))
    checkpoint, dataset = Path(options.stage.checkpoint), options.images.named_data(run).dataset
    print(next_steps.lines(next_steps.embed(checkpoint, dataset), next_steps.export(checkpoint)))
    return accuracy.top1


def images_of(run: SavedRun, options: LinearOptions) -> ImageData:
    """The images of a run, or those that the command line names.

    Raises:
        UserError: they have other classes than those that the run was trained with.
    """
    named = options.images.named_data(run)
    # What a checkpoint names may be a command: those are for the user to give.
    fetch = options.images.dataset is not None
    data = load_data(named, seed=run.options.seeds.seed, fetch=fetch)
    if data.classes != run.about_images["classes"]:
        raise UserError(f"{named.dataset} has other classes now than when {run.path} was trained")
    return data


@contextmanager
def writing_to(folder: Path) -> Iterator[Path]:
    """Turn the error of a folder that cannot be written to into one of the user's."""
    try:
        yield folder
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error


def write(run: SavedRun, found: Found, results: dict[str, Any]) -> None:
    """Write linear.json and linear.pt to the folder of a run."""
    folder = run.path.parent
    found.classifier.step = run.state.step
    with writing_to(folder):
        written = save_classifier(folder, found.classifier)
        replace_text(folder / "linear.json", json.dumps(results, indent=2) + "\n")
    print(f"written to {folder / 'linear.json'} and {written}")


def say(results: dict[str, Any], found: Found, *, num_images: int) -> None:
    """Print the accuracies."""
    kind = "linear" if found.classifier.encoder is None else "fine-tuned"
    for key, images in (("top1_train", "training"), ("top1_validation", "validation")):
        if results.get(key) is not None:
            print(f"top-1 {results[key]:.2%} on {images} images")
    print(
        f"{kind} top-1 {results['top1']:.2%}, top-5 {results['top5']:.2%} "
        f"on {num_images} test images"
    )


if __name__ == "__main__":
    run_script(main)
