"""Fit a linear classifier on the frozen encoder of a run: the usual measure of its embedding.

python train/linear.py --checkpoint runs/NAME/last.pt

Each image is encoded once, without augmentation; the features are standardised and the classifier
is fitted by L-BFGS. The problem is convex, so there is no learning rate or schedule to choose.
"""

import run.quiet_interrupt  # noqa: F401  before all that takes long to import

# isort: split

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.sources import DataOptions, load_data
from data.views import build_views
from evaluation.embeddings import embed, encode_stored
from evaluation.knn import accuracy
from run import next_steps
from run.atomic_write import replace_text
from run.command_line import parse, run_script
from run.device import Device, pick_device
from run.errors import UserError
from run.rules import broken, out_of_range
from run.saved_run import SavedRun, open_run

DESCRIPTION = (__doc__ or "").split("\n", 1)[0]


@dataclass
class LinearOptions:
    """The linear stage.

    Args:
        checkpoint: A checkpoint of pretrain.py (last.pt, best.pt), or the folder of a run (its last.pt).
        dataset: Fit on and measure by this data set, which has the run's classes; as of pretrain.py.
            Default: that of the run, of which nothing is fetched.
        data_root: Default: the one that the run was trained with; with --dataset as of pretrain.py.
        val_fraction: With --dataset, as of pretrain.py.
        val_shards: With --dataset, as of pretrain.py.
        weight_decay: L2 penalty of the linear layer.
        max_iterations: Most L-BFGS iterations.
        workers: Processes that load images.
        device: auto: cuda if available, then mps, then cpu.
    """

    checkpoint: str
    dataset: str | None = None
    data_root: str | None = None
    val_fraction: float | None = None
    val_shards: str | None = None
    weight_decay: float = 1e-4
    max_iterations: int = 200
    workers: int = 0
    device: Device = "auto"

    def mistakes(self) -> list[str]:
        """What is out of range or contradicts itself, one sentence each."""
        named = self.dataset is not None
        rules = [
            (named or self.val_fraction is None, "--val_fraction needs --dataset"),
            (named or self.val_shards is None, "--val_shards needs --dataset"),
        ]
        return broken(rules) + out_of_range(
            self, at_least={"weight_decay": 0, "max_iterations": 1, "workers": 0}
        )


def main(argv: list[str] | None = None) -> float:
    """Run what the command line asks for; returns the top-1 accuracy on the test images."""
    options = parse(LinearOptions, argv, prog="train/linear.py", description=DESCRIPTION)
    return linear(options)


def linear(options: LinearOptions) -> float:
    """Fit on the training images of a run, measure on its test images, write linear.json."""
    run = open_run(Path(options.checkpoint))
    device = pick_device(options.device)
    named, seed = named_data(options, run), run.options.seeds.seed
    # What a checkpoint names may be a command: those are for the user to give.
    data = load_data(named, seed=seed, fetch=options.dataset is not None)
    if data.classes != run.about_images["classes"]:
        raise UserError(f"{named.dataset} has other classes now than when {run.path} was trained")

    model = run.network().to(device)
    views = build_views(
        run.options.views, data, seed=seed, memory_format=run.options.network.memory_format
    )
    encode = partial(encode_stored, model, views)
    splits = {"train": data.train, "test": data.test}
    if data.validation is not None:
        splits["validation"] = data.validation
    features = {
        name: embed(encode, split, device=device, workers=options.workers)
        for name, split in splits.items()
    }
    mean, std = features["train"].mean(0), features["train"].std(0).clamp(min=1e-6)
    features = {name: (rows - mean) / std for name, rows in features.items()}
    labels = data.train.labels.to(device)
    classifier = fit(features["train"], labels, len(data.classes), options)

    with torch.no_grad():
        shares = {
            name: accuracy(classifier(features[name]).argmax(1).cpu(), split.labels)
            for name, split in splits.items()
        }
    results = {"top1": shares.pop("test")}
    results |= {f"top1_{name}": share for name, share in shares.items()}
    results["epochs"] = run.state.epoch
    written = run.path.parent / "linear.json"
    replace_text(written, json.dumps(results, indent=2) + "\n")
    print(f"linear top-1 {results['top1']:.2%} on {len(data.test)} test images")
    others = ", ".join(f"{name} images {share:.2%}" for name, share in shares.items())
    print(f"({others}); written to {written}")
    checkpoint = Path(options.checkpoint)
    following = next_steps.embed(checkpoint, named.dataset), next_steps.export(checkpoint)
    print(next_steps.lines(*following))
    return results["top1"]


def named_data(options: LinearOptions, run: SavedRun) -> DataOptions:
    """The data of a run, or what the command line names where it names any.

    Raises:
        UserError: the options contradict each other.
    """
    data = run.options.data
    if options.dataset is not None:
        # It is named as a whole; how its images are made the network's input is the run's.
        about = run.about_images
        data = replace(
            data,
            dataset=options.dataset,
            data_root=options.data_root,
            val_fraction=options.val_fraction,
            val_shards=options.val_shards,
            in_chans=about["channels"],
            mean=about.get("mean", data.mean),
            std=about.get("std", data.std),
        )
    elif options.data_root is not None:
        data = replace(data, data_root=options.data_root)
    if mistakes := data.mistakes():
        raise UserError("; ".join(mistakes))
    return data


def fit(features: Tensor, labels: Tensor, num_classes: int, options: LinearOptions) -> nn.Linear:
    """Multinomial logistic regression of (N,) labels on (N, F) features."""
    classifier = nn.Linear(features.shape[1], num_classes, device=features.device)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.LBFGS(
        classifier.parameters(), max_iter=options.max_iterations, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        penalty = classifier.weight.square().sum() * (options.weight_decay / 2)
        loss = F.cross_entropy(classifier(features), labels) + penalty
        loss.backward()
        return loss

    optimizer.step(objective)
    return classifier


if __name__ == "__main__":
    run_script(main)
