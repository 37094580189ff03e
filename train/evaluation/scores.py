"""Where the class scores of a run come from: its method's own classifier, or its linear stage."""

import copy
import shlex
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from data.images import ImageData
from data.views import Views
from evaluation.embeddings import encode_stored
from linear_stage.classifier import FILE, load_classifier
from network.embedder import Embedder
from run.checkpoint import restored_from
from run.errors import UserError
from run.saved_run import SavedRun
from training.build import build_method

# Those of a method's classifier in its state_dict.
PREFIX = "classifier."


class Classifier(NamedTuple):
    """What a run classifies by.

    Attributes:
        origin: what it is, in words.
        scores: (B, C, S, S) uint8 to (B, classes), on the device of the run's network.
        weights: all that the scores depend on, by name.
    """

    origin: str
    scores: Callable[[Tensor], Tensor]
    weights: dict[str, Tensor]


def open_classifier(run: SavedRun, model: Embedder, views: Views, data: ImageData) -> Classifier:
    """The classifier of a run, on the device of its network.

    Raises:
        UserError: its method has none, and linear.py has made none of this checkpoint.
    """
    if any(name.startswith(PREFIX) for name in run.content.get("method") or {}):
        return _own(run, model, views, data)
    return _of_linear_stage(run, model, views, data)


def _own(run: SavedRun, model: Embedder, views: Views, data: ImageData) -> Classifier:
    method = build_method(run.options, model, data)
    with restored_from(run.path):
        method.load_state_dict(run.content["method"])
    classifier = method.classifier
    assert classifier is not None
    classifier.to(next(model.parameters()).device).eval()

    def scores(images: Tensor) -> Tensor:
        result: Tensor = classifier(encode_stored(model, views, images).float())
        return result

    weights = {PREFIX + name: value for name, value in classifier.state_dict().items()}
    return Classifier(f"its own ({run.options.method.method})", scores, run.weights | weights)


def _of_linear_stage(run: SavedRun, model: Embedder, views: Views, data: ImageData) -> Classifier:
    path = run.path.parent / FILE
    command = f"python train/linear.py --checkpoint {shlex.quote(str(run.path))}"
    if not path.is_file():
        raise UserError(f"{run.path} has no classifier: run {command} first")
    linear = load_classifier(path)
    if linear.step != run.state.step:
        raise UserError(
            f"{path} was made of step {linear.step}, {run.path} is of step {run.state.step}: "
            f"run {command} again"
        )
    if len(linear.bias) != len(data.classes):
        raise UserError(f"{path} has {len(linear.bias)} classes, {data.name} {len(data.classes)}")
    origin = f"linear stage ({linear.protocol})"
    weights = run.weights | {"linear.weight": linear.weight, "linear.bias": linear.bias}
    encode = partial(encode_stored, model, views)
    if linear.encoder is not None:
        origin = f"linear stage ({linear.protocol}, fine-tuned)"
        weights |= linear.encoder
        # The embedding is measured as the run has left it.
        tuned = copy.deepcopy(model)
        with restored_from(path):
            tuned.encoder.load_state_dict(linear.encoder)
        encode = partial(encode_stored, tuned, views)
    return Classifier(origin, lambda images: linear.logits(encode(images).float()), weights)
