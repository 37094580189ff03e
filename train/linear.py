"""Fit a linear classifier on the frozen encoder of a run: the usual measure of its embedding.

python train/linear.py --checkpoint runs/NAME/last.pt

Each image is encoded once, without augmentation; the features are standardised and the classifier
is fitted by L-BFGS. The problem is convex, so there is no learning rate or schedule to choose.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.sources import load_data
from data.views import build_views
from evaluation.embeddings import embed, encode_stored
from evaluation.knn import accuracy
from network.weights import load_model
from run.atomic_write import replace_text
from run.checkpoint import LAST, load_checkpoint
from run.command_line import parse, run_script
from run.config import LinearConfig, PretrainConfig
from run.device import pick_device
from run.errors import UserError

DESCRIPTION = (__doc__ or "").split("\n", 1)[0]


def main(argv: list[str] | None = None) -> float:
    """Run what the command line asks for; returns the top-1 accuracy on the test images."""
    config = parse(LinearConfig, argv, prog="train/linear.py", description=DESCRIPTION)
    return linear(config)


def linear(config: LinearConfig) -> float:
    """Fit on the training images of a run, measure on its test images, write linear.json."""
    path = Path(config.checkpoint)
    path = path / LAST if path.is_dir() else path
    saved = load_checkpoint(path)
    device = pick_device(config.device)
    run = named_data(config, saved)
    # What a checkpoint names may be a command: those are for the user to give.
    data = load_data(run, fetch=config.dataset is not None)
    if data.classes != saved["data"]["classes"]:
        raise UserError(f"{run.dataset} has other classes now than when {path} was trained")

    model = load_model(path, saved)
    model = model.to(device).to(memory_format=run.memory_format)
    encode = partial(encode_stored, model, build_views(run, data))
    splits = {"train": data.train, "test": data.test}
    if data.validation is not None:
        splits["validation"] = data.validation
    features = {
        name: embed(encode, split, device=device, workers=config.workers)
        for name, split in splits.items()
    }
    mean, std = features["train"].mean(0), features["train"].std(0).clamp(min=1e-6)
    features = {name: (rows - mean) / std for name, rows in features.items()}
    labels = data.train.labels.to(device)
    classifier = fit(features["train"], labels, len(data.classes), config)

    with torch.no_grad():
        shares = {
            name: accuracy(classifier(features[name]).argmax(1).cpu(), split.labels)
            for name, split in splits.items()
        }
    results = {"top1": shares.pop("test")}
    results |= {f"top1_{name}": share for name, share in shares.items()}
    results["epochs"] = saved["state"]["epoch"]
    written = path.parent / "linear.json"
    replace_text(written, json.dumps(results, indent=2) + "\n")
    print(f"linear top-1 {results['top1']:.2%} on {len(data.test)} test images")
    others = ", ".join(f"{name} images {share:.2%}" for name, share in shares.items())
    print(f"({others}); written to {written}")
    return results["top1"]


def named_data(config: LinearConfig, saved: dict[str, Any]) -> PretrainConfig:
    """The config of a run, with the data that the command line names where it names any.

    Raises:
        UserError: the options contradict each other.
    """
    run = PretrainConfig(**saved["config"])
    if config.dataset is not None:
        # It is named as a whole; how its images are made the network's input is the run's.
        of_run = {key: saved["data"][key] for key in ("mean", "std") if key in saved["data"]}
        run = replace(
            run,
            dataset=config.dataset,
            data_root=config.data_root,
            val_fraction=config.val_fraction,
            val_shards=config.val_shards,
            in_chans=saved["data"]["channels"],
            **of_run,
        )
    elif config.data_root is not None:
        run = replace(run, data_root=config.data_root)
    if mistakes := run.mistakes():
        raise UserError("; ".join(mistakes))
    return run


def fit(features: Tensor, labels: Tensor, num_classes: int, config: LinearConfig) -> nn.Linear:
    """Multinomial logistic regression of (N,) labels on (N, F) features."""
    classifier = nn.Linear(features.shape[1], num_classes, device=features.device)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.LBFGS(
        classifier.parameters(), max_iter=config.max_iterations, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        penalty = classifier.weight.square().sum() * (config.weight_decay / 2)
        loss = F.cross_entropy(classifier(features), labels) + penalty
        loss.backward()
        return loss

    optimizer.step(objective)
    return classifier


if __name__ == "__main__":
    run_script(main)
