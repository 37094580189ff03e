"""The class scores of a run, and of the baselines that learn nothing: an accuracy of each image."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.images import ImageData, Split
from data.sources import load_data
from data.views import build_views
from evaluation.embeddings import embed, encode_stored, pixels
from evaluation.scores import open_classifier
from linear_stage.convex_fit import ConvexOptions, fit_convex
from linear_stage.features import Features, embedded_batches
from network.embedder import build_model
from run.atomic_write import replace_file
from run.checkpoint import LAST
from run.device import pick_device
from run.options import PretrainOptions
from run.saved_run import open_run

# Of a checkpoint whose encoder alone is to be used.
LEFT_OUT = ("method", "optimizer", "probe")


def scores_of_run(folder: Path, options: PretrainOptions) -> tuple[Tensor, Tensor]:
    """The (N, C) scores and (N,) labels of a run's validation images, without any of the test images."""
    device, data, split = _images(options)
    run = open_run(folder)
    model = run.network().to(device).eval()
    views = build_views(options.views, data, seed=options.seeds.seed)
    classifier = open_classifier(run, model, views, data)
    return embed(classifier.scores, split, device=device, workers=0).float().cpu(), split.labels


def scores_of_baseline(
    folder: Path, options: PretrainOptions, *, untrained: bool
) -> tuple[Tensor, Tensor]:
    """The same of a linear classifier of raw pixels, or of the features of the untrained encoder."""
    device, data, split = _images(options)
    scores = _classifier_of_baseline(folder, options, data, device, untrained=untrained)
    return embed(scores, split, device=device, workers=0).float().cpu(), split.labels


def corruptions_of_baseline(
    folder: Path,
    options: PretrainOptions,
    reference: dict[str, Any],
    *,
    untrained: bool,
    num_images: int,
) -> dict[str, Any]:
    """What evaluate.py would find of such a classifier on corrupted images, and of a reference has found."""
    # They need the libraries of evaluate.py.
    from evaluation.classification import top1
    from evaluation.corruptions import compare, draw_corruptions
    from evaluation.options import EvaluateOptions

    device, data, _ = _images(options)
    scores = _classifier_of_baseline(folder, options, data, device, untrained=untrained)
    scores_of = partial(embed, scores, device=device, workers=0)
    drawn = draw_corruptions(data, EvaluateOptions([], corruption_images=num_images))
    clean = top1(scores_of(drawn.split).cpu(), drawn.split.labels)
    found: dict[str, Any] = {"of": drawn.about, "clean_top1": clean}
    drawn.test(scores_of, {}, found.update)
    return {"corruptions": found, "baseline": compare(found, reference["corruptions"])}


def _classifier_of_baseline(
    folder: Path,
    options: PretrainOptions,
    data: ImageData,
    device: torch.device,
    *,
    untrained: bool,
) -> Callable[[Tensor], Tensor]:
    """Takes (B, C, S, S) uint8 images to (B, C) scores."""
    encode = pixels
    if untrained:
        torch.manual_seed(options.seeds.seed)
        model = build_model(options.network, channels=data.channels, image_size=data.image_size)
        views = build_views(options.views, data, seed=options.seeds.seed)
        encode = partial(encode_stored, model.to(device), views)
    batches = embedded_batches(encode, data.train, device=device, workers=0)
    limit = ConvexOptions.features_gib * 2**30
    features = Features(batches, len(data.train), device=device, limit=limit, folder=folder)
    linear, _ = fit_convex(features, len(data.classes))

    def scores(images: Tensor) -> Tensor:
        return linear.logits(encode(images).float())

    return scores


def copy_encoder(source: Path, target: Path) -> None:
    """Copy the checkpoint of a run to another folder, without its classifier and its optimizer."""
    content = {
        name: value for name, value in open_run(source).content.items() if name not in LEFT_OUT
    }
    replace_file(target / LAST, lambda file: torch.save(content, file))


def _images(options: PretrainOptions) -> tuple[torch.device, ImageData, Split]:
    data = load_data(options.data, seed=options.seeds.seed)
    split = data.test if data.validation is None else data.validation
    return pick_device(options.device.device), data, split
