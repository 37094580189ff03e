"""The linear stage of one run: its images, their embeddings, and the classifier of either protocol."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.batches import training_batches
from data.images import ImageData, Split
from data.views import build_views, training_images
from evaluation.embeddings import encode_stored
from linear_stage.classifier import Accuracy, LinearClassifier, measure
from linear_stage.convex_fit import fit_convex
from linear_stage.features import Features, embedded_batches
from linear_stage.options import LinearOptions
from linear_stage.paper_protocol import PaperTraining, train_and_choose
from network.embedder import Embedder
from run.errors import UserError
from run.out_of_memory import out_of_memory_names
from run.saved_run import SavedRun
from run.seeds import seed_of

# Tells the seeds of the linear stage from those of the run.
LINEAR_STAGE = 2


class Found(NamedTuple):
    """What a protocol ends with.

    Attributes:
        model: whose embeddings are classified.
        about: what linear.json says of it.
    """

    model: Embedder
    classifier: LinearClassifier
    about: dict[str, Any]


@dataclass
class LinearStage:
    """What both protocols work on."""

    options: LinearOptions
    run: SavedRun
    data: ImageData
    device: torch.device

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

    def fit(self, model: Embedder) -> Found:
        """By --protocol convex: fit to the embeddings of the plain training images."""
        options, data = self.options, self.data
        with out_of_memory_names(features_gib=options.convex.features_gib):
            features = Features(
                self.embed(model, data.train),
                len(data.train),
                device=self.device,
                limit=options.convex.features_gib * 2**30,
                folder=self.run.path.parent,
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
            [found] = self.measure(model, [classifier], data.validation)
            about |= {"top1_validation": found.top1, "top5_validation": found.top5}
        about |= {"iterations": fit.iterations, "converged": fit.converged}
        return Found(model, classifier, about)

    def train(self, model: Embedder) -> Found:
        """By --protocol paper: train on random views.

        Raises:
            UserError: there is something to choose, and no validation images to choose by.
        """
        paper, validation = self.options.paper, self.data.validation
        candidates = paper.candidates(self.options.stage.weight_decays)
        if len(candidates) > 1 and validation is None:
            raise UserError(
                f"{len(candidates)} pairs of --learning_rate and --weight_decay need validation "
                "images to choose by: hold some out by --validation_fraction, or give one of each"
            )
        validate = None if validation is None else partial(self.measure, split=validation)
        with out_of_memory_names(batch_size=self.options.batches.batch_size):
            chosen, trials = train_and_choose(self._training(), model, candidates, validate)
        about = asdict(chosen.trial)
        if paper.finetune:
            about["encoder_learning_rate"] = paper.encoder_rate
        if len(trials) > 1 and validation is not None:
            about["trials"] = [asdict(trial) for trial in trials]
            print(
                f"chosen of {len(trials)} on {len(validation)} validation images: --learning_rate "
                f"{chosen.trial.learning_rate} --weight_decay {chosen.trial.weight_decay}"
            )
        return Found(chosen.model, chosen.classifier, about)

    def _training(self) -> PaperTraining:
        options, of_run, data = self.options, self.run.options, self.data
        seed = seed_of(of_run.seeds.seed, LINEAR_STAGE)
        views = options.paper.views(data.name)
        images = training_images(views, data, seed=seed)
        order, batches = training_batches(images, options.batches, seed=seed, device=self.device)
        return PaperTraining(
            options.paper,
            options.schedule,
            of_run.step,
            order,
            batches,
            build_views(views, data, seed=seed, memory_format=of_run.network.memory_format),
            num_classes=len(data.classes),
            seed=seed,
        )
