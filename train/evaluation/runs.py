"""Runs evaluated one after another: all measures of each, its files, and a table of all.

evaluation.json is written after each part that takes long, and read before: what it holds of the same
weights and the same corrupted images is not done again.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.images import ImageData
from data.sources import DataOptions, load_data
from data.views import Views, build_views
from evaluation.classification import classify, top1
from evaluation.comparison import numbers_of, write_table, written
from evaluation.corruptions import Corruptions, compare, draw_corruptions
from evaluation.embeddings import embed, encode_stored
from evaluation.options import EvaluateOptions, by_names_here
from evaluation.page import draw_page
from evaluation.retrieval import retrieve
from evaluation.scores import Classifier, open_classifier
from evaluation.transfer import transfer
from network.embedder import Embedder
from run.atomic_write import replace_text
from run.checkpoint import LAST
from run.errors import UserError
from run.processes import ALONE, Ranks
from run.saved_run import SavedRun, open_run

Results = dict[str, Any]


@dataclass
class Opened:
    """A run with all that its evaluation needs.

    Attributes:
        corruptions: the corrupted images that it is tested on, if it is.
    """

    run: SavedRun
    data: ImageData
    model: Embedder
    views: Views
    classifier: Classifier
    corruptions: Corruptions | None

    @property
    def name(self) -> str:
        """Its folder, and which of its checkpoints if that is not the last."""
        folder, file = self.run.path.resolve().parent.name, self.run.path
        return folder if file.name == LAST else f"{folder} ({file.stem})"

    def file(self, ending: str) -> Path:
        """Where its results are written."""
        of = "" if self.run.path.name == LAST else f"-{self.run.path.stem}"
        return self.run.path.parent / f"evaluation{of}.{ending}"


def evaluate(options: EvaluateOptions, device: torch.device, ranks: Ranks = ALONE) -> list[Path]:
    """Evaluate the runs that the options name; returns the JSON file of each.

    Raises:
        UserError: a run cannot be opened, has no classifier, or cannot be compared with the baseline.
    """
    paths = list(dict.fromkeys(map(_checkpoint, options.checkpoint)))
    baseline = None if options.baseline is None else _checkpoint(options.baseline)
    every = dict.fromkeys([baseline, *paths] if baseline else paths)
    # All are opened before any is evaluated, which may take hours.
    opened = {path: open_evaluated(path, options, device, ranks) for path in every}
    if baseline:
        for path in paths:
            _check_comparable(opened[path], opened[baseline])
    results = {path: measure(one, options, device, ranks) for path, one in opened.items()}
    if ranks.is_rank_0:
        for path, one in opened.items():
            if baseline:
                own, other = (results[of]["corruptions"] for of in (path, baseline))
                results[path]["baseline"] = {"run": opened[baseline].name, **compare(own, other)}
            write(one, results[path])
            draw_page(results[path], one.file("png"))
        for path in paths:
            numbers = numbers_of(results[path]).items()
            print("  ".join(f"{title} {written(title, number)}" for title, number in numbers))
            print(f"written to {opened[path].file('json')}  {opened[path].file('png')}")
        if len(paths) > 1:
            folder = Path(options.output) if options.output else paths[0].parent.parent
            write_table([results[path] for path in paths], folder)
    return [opened[path].file("json") for path in paths]


def open_evaluated(
    path: Path, options: EvaluateOptions, device: torch.device, ranks: Ranks
) -> Opened:
    """Open a run, its images and its classifier."""
    run = open_run(path)
    of_run, seed = run.options, run.options.seeds.seed
    # What a checkpoint names may be a command: nothing of it is fetched or run.
    data = load_data(options.at_root(of_run.data), seed=seed, fetch=False)
    if data.classes != run.about_images["classes"]:
        raise UserError(f"{data.name} has other classes now than when {path} was trained")
    model = run.network().to(device).eval()
    views = build_views(of_run.views, data, seed=seed, memory_format=of_run.network.memory_format)
    classifier = open_classifier(run, model, views, data)
    corruptions = draw_corruptions(data, options) if options.corruptions else None
    return Opened(run, data, model, views, classifier, corruptions)


def measure(one: Opened, options: EvaluateOptions, device: torch.device, ranks: Ranks) -> Results:
    """Everything that is measured of a run, as its JSON file has it."""
    test, labels = one.data.test, one.data.test.labels
    print(f"{one.name}: {len(test)} test images of {one.data.name}", flush=True)
    embed_all = partial(embed, device=device, workers=options.workers, ranks=ranks)
    encode = partial(encode_stored, one.model, one.views)
    weights = _digest(one.classifier.weights)
    results: Results = ranks.from_rank_0(partial(_written, one.file("json"), weights))

    scores = embed_all(one.classifier.scores, test).float().cpu()
    results |= {
        "run": one.name,
        "weights": weights,
        "epochs": one.run.state.epoch,
        "method": one.run.options.method.method,
        "classifier": one.classifier.origin,
        "dataset": one.data.name,
        "test_images": len(test),
        "classification": classify(scores, labels, one.data.classes),
        "retrieval": retrieve(embed_all(encode, test), labels, ranks=ranks),
    }
    if (named := options.transferred()) is not None:
        # Its images are made what the network takes.
        channels = one.run.about_images["channels"]
        fitted = replace(named, image_size=one.data.image_size, in_chans=channels)
        with ranks.local_rank_0_first():
            data = load_transferred(fitted)
        shares = transfer(partial(embed_all, encode), data)
        results["transfer"] = results.get("transfer", {}) | {data.name: shares}
    if (corruptions := one.corruptions) is not None:
        before = results.get("corruptions", {})
        about = {
            "of": corruptions.about,
            "clean_top1": top1(scores[corruptions.places], labels[corruptions.places]),
        }

        def keep(found: dict[str, Any]) -> None:
            results["corruptions"] = about | found
            if ranks.is_rank_0:
                write(one, results)

        found = before.get("top1", {}) if before.get("of") == corruptions.about else {}
        corruptions.test(partial(embed_all, one.classifier.scores), found, keep)
    return results


def load_transferred(named: DataOptions) -> ImageData:
    """The data set of --transfer; an error names the options as they are called here."""
    try:
        return load_data(named)
    except UserError as error:
        raise UserError(by_names_here(str(error))) from error


def write(one: Opened, results: Results) -> None:
    """Write the results of a run as JSON.

    Raises:
        UserError: they cannot be written there.
    """
    path = one.file("json")
    try:
        replace_text(path, json.dumps(results, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error


def _checkpoint(path: str) -> Path:
    return Path(path) / LAST if Path(path).is_dir() else Path(path)


def _written(path: Path, weights: str) -> Results:
    """What a JSON file holds already, if it is of these weights."""
    try:
        results: Results = json.loads(path.read_text())
        results.pop("baseline", None)  # another may be given, or none
        return results if results["weights"] == weights else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _digest(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        values = weights[name].detach().cpu().contiguous().reshape(-1)
        digest.update(name.encode() + values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_comparable(one: Opened, baseline: Opened) -> None:
    assert one.corruptions is not None and baseline.corruptions is not None
    if one.corruptions.split.order != baseline.corruptions.split.order:
        raise UserError(
            f"--baseline {baseline.run.path} has other test images ({baseline.data.name}) than "
            f"{one.run.path} ({one.data.name})"
        )
