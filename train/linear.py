"""Fit a linear classifier on the frozen encoder of a run: the usual measure of its embedding.

python train/linear.py --checkpoint runs/NAME/last.pt

Each image is encoded once, without augmentation; the features are standardised and the classifier
is fitted by L-BFGS. The problem is convex, so there is no learning rate or schedule to choose.
"""

import run.quiet_interrupt  # noqa: F401  before all that takes long to import

# isort: split

import json
from functools import partial
from pathlib import Path
from typing import Any

from data.images import ImageData
from data.sources import load_data
from data.views import build_views
from evaluation.embeddings import encode_stored
from linear_stage.classifier import measure, save_classifier
from linear_stage.convex_fit import fit_convex
from linear_stage.features import Features, embedded_batches
from linear_stage.options import LinearOptions
from run.atomic_write import replace_text
from run.command_line import parse, run_script
from run.device import pick_device
from run.errors import UserError
from run.saved_run import SavedRun, open_run

DESCRIPTION = (__doc__ or "").split("\n", 1)[0]


def main(argv: list[str] | None = None) -> float:
    """Run what the command line asks for; returns the top-1 accuracy on the test images."""
    options = parse(LinearOptions, argv, prog="train/linear.py", description=DESCRIPTION)
    return linear(options)


def linear(options: LinearOptions) -> float:
    """Fit on the training images of a run, measure on its test images, write linear.json and linear.pt."""
    run = open_run(Path(options.stage.checkpoint))
    device = pick_device(options.stage.device)
    data = images_of(run, options)
    folder, workers = run.path.parent, options.batches.workers

    model = run.network().to(device)
    views = build_views(
        run.options.views,
        data,
        seed=run.options.seeds.seed,
        memory_format=run.options.network.memory_format,
    )
    embed = partial(
        embedded_batches, partial(encode_stored, model, views), device=device, workers=workers
    )
    features = Features(
        embed(data.train),
        len(data.train),
        device=device,
        limit=options.convex.features_gib * 2**30,
        folder=folder,
    )
    classifier, fit = fit_convex(
        features,
        len(data.classes),
        weight_decay=options.stage.weight_decay,
        max_iterations=options.convex.max_iterations,
    )
    print(fit)

    splits = {"test": data.test, "validation": data.validation}
    found = {
        name: measure([classifier], embed(split))[0]
        for name, split in splits.items()
        if split is not None
    }
    found["train"] = fit.accuracy
    classifier.step = run.state.step
    save_classifier(folder, classifier)
    results: dict[str, Any] = {"top1": found["test"].top1, "top5": found["test"].top5}
    for name in ("train", "validation"):
        if name in found:
            results |= {f"top1_{name}": found[name].top1, f"top5_{name}": found[name].top5}
    results |= {
        "epochs": run.state.epoch,
        "protocol": classifier.protocol,
        "iterations": fit.iterations,
        "converged": fit.converged,
    }
    written = folder / "linear.json"
    replace_text(written, json.dumps(results, indent=2) + "\n")
    print(
        f"linear top-1 {results['top1']:.2%}, top-5 {results['top5']:.2%} "
        f"on {len(data.test)} test images"
    )
    others = ", ".join(
        f"{name} images {found[name].top1:.2%}" for name in ("train", "validation") if name in found
    )
    print(f"({others}); written to {written} and linear.pt beside it")
    return found["test"].top1


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


if __name__ == "__main__":
    run_script(main)
