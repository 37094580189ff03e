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
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.batches import training_batches
from data.images import ImageData, Split
from data.sources import load_data
from data.views import build_views, training_images
from evaluation.embeddings import encode_stored
from linear_stage.classifier import Accuracy, LinearClassifier, measure, save_classifier
from linear_stage.convex_fit import fit_convex
from linear_stage.features import Features, embedded_batches
from linear_stage.options import LinearOptions
from linear_stage.paper_protocol import PaperStage, train_and_choose
from network.embedder import Embedder
from run.atomic_write import replace_text
from run.command_line import parse, run_script
from run.device import pick_device
from run.errors import UserError
from run.saved_run import SavedRun, open_run
from run.seeds import seed_of

DESCRIPTION = (__doc__ or "").split("\n", 1)[0]
# Tells the seeds of the linear stage from those of the run.
LINEAR_STAGE = 2


def main(argv: list[str] | None = None) -> float:
    """Run what the command line asks for; returns the top-1 accuracy on the test images."""
    options = parse(LinearOptions, argv, prog="train/linear.py", description=DESCRIPTION)
    return linear(options)


@dataclass
class Stage:
    """What the linear stage works on."""

    options: LinearOptions
    run: SavedRun
    data: ImageData
    device: torch.device

    @property
    def folder(self) -> Path:
        """Where it writes: the folder of the run."""
        return self.run.path.parent

    def embed(self, model: Embedder, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
        """The embeddings of the plain images of a split, with their labels."""
        of_run = self.run.options
        memory_format = of_run.network.memory_format
        views = build_views(of_run.views, self.data, seed=0, memory_format=memory_format)
        return embedded_batches(
            partial(encode_stored, model, views),
            split,
            device=self.device,
            workers=self.options.batches.workers,
        )

    def measure(
        self, model: Embedder, classifiers: list[LinearClassifier], split: Split
    ) -> list[Accuracy]:
        """The accuracy of each classifier on a split."""
        return measure(classifiers, self.embed(model, split))


def linear(options: LinearOptions) -> float:
    """Fit on the training images of a run, measure on its test images, write both to its folder."""
    run = open_run(Path(options.stage.checkpoint))
    device = pick_device(options.stage.device)
    stage = Stage(options, run, images_of(run, options), device)
    model = run.network().to(device)
    by = by_paper if options.stage.protocol == "paper" else by_convex_fit
    model, classifier, about = by(stage, model)
    [found] = stage.measure(model, [classifier], stage.data.test)
    classifier.step = run.state.step
    results = {"top1": found.top1, "top5": found.top5, **about}
    results |= {"epochs": run.state.epoch, "protocol": classifier.protocol}
    written = stage.folder / "linear.json"
    try:
        save_classifier(stage.folder, classifier)
        replace_text(written, json.dumps(results, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {stage.folder}: {error.strerror}") from error

    kind = "linear" if classifier.encoder is None else "fine-tuned"
    num_images = len(stage.data.test)
    print(f"{kind} top-1 {found.top1:.2%}, top-5 {found.top5:.2%} on {num_images} test images")
    others = [
        f"{name} images {results[key]:.2%}"
        for name in ("train", "validation")
        if results.get(key := f"top1_{name}") is not None
    ]
    print(
        "; ".join(
            [f"({', '.join(others)})"] * bool(others) + [f"written to {written} and linear.pt"]
        )
    )
    return found.top1


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


def by_convex_fit(
    stage: Stage, model: Embedder
) -> tuple[Embedder, LinearClassifier, dict[str, Any]]:
    """The network, a classifier fitted to its embeddings of plain images, and what is to be said."""
    options, data = stage.options, stage.data
    features = Features(
        stage.embed(model, data.train),
        len(data.train),
        device=stage.device,
        limit=options.convex.features_gib * 2**30,
        folder=stage.folder,
    )
    [weight_decay] = options.stage.weight_decays
    classifier, fit = fit_convex(
        features,
        len(data.classes),
        weight_decay=weight_decay,
        max_iterations=options.convex.max_iterations,
    )
    print(fit)
    about: dict[str, Any] = {"top1_train": fit.accuracy.top1, "top5_train": fit.accuracy.top5}
    if data.validation is not None:
        [found] = stage.measure(model, [classifier], data.validation)
        about |= {"top1_validation": found.top1, "top5_validation": found.top5}
    about |= {"iterations": fit.iterations, "converged": fit.converged}
    return model, classifier, about


def by_paper(stage: Stage, model: Embedder) -> tuple[Embedder, LinearClassifier, dict[str, Any]]:
    """The network, a classifier trained on random views, and what is to be said.

    Raises:
        UserError: there is something to choose, and no validation images to choose by.
    """
    options, of_run, data = stage.options, stage.run.options, stage.data
    candidates = options.paper.candidates(options.stage.weight_decays)
    if len(candidates) > 1 and data.validation is None:
        raise UserError(
            f"{len(candidates)} pairs of --learning_rate and --weight_decay need validation images to "
            "choose by: hold some out by --validation_fraction, or give one of each"
        )
    seed = seed_of(of_run.seeds.seed, LINEAR_STAGE)
    views = options.paper.views(data.name)
    order, batches = training_batches(
        training_images(views, data, seed=seed), options.batches, seed=seed, device=stage.device
    )
    training = PaperStage(
        options.paper,
        options.schedule,
        of_run.step,
        order,
        batches,
        build_views(views, data, seed=seed, memory_format=of_run.network.memory_format),
        num_classes=len(data.classes),
        seed=seed,
    )
    validate = None
    if data.validation is not None:
        validate = partial(stage.measure, split=data.validation)
    chosen, trials = train_and_choose(training, model, candidates, validate)
    about = asdict(chosen.trial)
    if len(trials) > 1:
        about["trials"] = [asdict(trial) for trial in trials]
        print(
            f"chosen of {len(trials)} on {len(data.validation or ())} validation images: "
            f"--learning_rate {chosen.trial.learning_rate} --weight_decay {chosen.trial.weight_decay}"
        )
    if options.paper.finetune:
        about["encoder_learning_rate"] = options.paper.encoder_rate
    return chosen.model, chosen.classifier, about


if __name__ == "__main__":
    run_script(main)
