"""The processes of tests/test_train_ranks.py: torchrun starts them once for many short trainings.

Each leaves what it found in a file. To import torch and timm takes longer than all of it.
"""

import os
import shutil
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import torch
from torch import nn

import train_fixtures  # noqa: F401  puts train/ on the path
from data.batches import training_batches
from data.images import Split
from data.views import Views
from evaluation import knn
from evaluation.embeddings import embed_share
from evaluation.evaluator import Evaluator
from network.momentum_encoder import MomentumEncoder
from pretrain import pretrain
from run.command_line import parse
from run.errors import UserError
from run.options import PretrainOptions
from run.processes import ALONE, Ranks, joined
from supcon_kernels import grad_cache_backward, supcon_loss
from train_fixtures import TINY
from train_parts import SmallEncoder, build_views, load_data, options_of, trainer_of
from training.trainer import Trainer

# Three epochs of ten steps.
OPTIONS = ["--batch_size=128", "--epochs=3", "--knn_every=2", "--save_every=3", "--keep=99"]
OPTIONS += ["--validation_fraction=0.04"]  # it costs no step
CARRYING = ["--ema_decay=0.9", "--probe=true"]
QUEUE = ["--queue_size=512", "--queue_momentum=0.9"]
NUM_STEPS = 4
# Without batch statistics what several processes compute is what one does.
NO_STATISTICS = {"model": "test_convnext", "stem": "standard", "image_size": 32}
STEPS: dict[str, dict[str, Any]] = {
    "views": NO_STATISTICS,
    "queue": {**NO_STATISTICS, "queue_size": 256, "queue_momentum": 0.9, "num_views": 3},
    "simclr": {**NO_STATISTICS, "method": "simclr", "optimizer": "lars", "clip_grad": 1.0},
    "chunks": {**NO_STATISTICS, "grad_cache_chunk": 24},
    "queue by chunks": {**NO_STATISTICS, "queue_size": 128, "grad_cache_chunk": 24},
    "compiled by chunks": {**NO_STATISTICS, "compile": True, "grad_cache_chunk": 24},
    "cross entropy": {**NO_STATISTICS, "method": "cross_entropy"},
    "joint": {**NO_STATISTICS, "method": "joint", "learn_temperature": True},
    "cmc": {**NO_STATISTICS, "method": "cmc"},
    "batch norm": {"model": "resnet10", "width": 4, "ema_decay": 0.9, "probe": True},
}


def run(folder: Path, ranks: Ranks, *options: object) -> Path:
    """One run of pretrain.py by processes that are there already."""
    arguments = [*TINY, *OPTIONS, f"--output_dir={folder}", *map(str, options)]
    config = parse(PretrainOptions, arguments, prog="", description="")
    return pretrain(config, torch.device("cpu"), ranks)


def run_and_resume(folder: Path, ranks: Ranks, name: str, *options: str) -> None:
    """A run, and a copy of it that goes on from a checkpoint; one that resumes compiles anew."""
    whole, resumed = run(folder, ranks, *options, f"--name={name}"), folder / f"{name}-resumed"
    ranks.from_rank_0(partial(shutil.copytree, whole, resumed))
    torch.compiler.reset()
    run(folder, ranks, *options, f"--resume={resumed / 'step-12.pt'}")


def train(options: dict[str, Any], ranks: Ranks = ALONE) -> Trainer:
    """A trainer after some steps."""
    config = options_of(
        batch_size=64, epochs=1, warmup_epochs=0, learning_rate=0.05, device="cpu", **options
    )
    data = load_data(config)
    # Without the minutes of a C++ compiler.
    with patch("torch.compile", partial(torch.compile, backend="aot_eager")):
        trainer = trainer_of(config, data, steps_per_epoch=9, ranks=ranks)
    _, batches = training_batches(data.train, config.batches, seed=0, ranks=ranks)
    trainer.losses = []
    for step, (images, labels) in zip(range(NUM_STEPS), batches):
        trainer.losses.append(trainer.step(images, labels, step).item())
    return trainer


def predictions(trainer: Trainer, options: dict[str, Any]) -> torch.Tensor:
    """Of the test images, as a run measures them."""
    config = options_of(**options)
    evaluation = Evaluator(
        trainer, load_data(config), config.evaluation, workers=0, before_batch=lambda: None
    )
    state = evaluation.baselines()
    evaluation.measure(state)
    return torch.cat(
        [evaluation.predictions(evaluation.test), torch.tensor([state.accuracy, state.probe or 0])]
    )


def nearest(ranks: Ranks = ALONE) -> dict[str, Any]:
    """Of some queries: the neighbours, with the bits of their similarities, and the classes.

    Every tenth row is the first again, and the last process has no row.
    """
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(1100, 24, generator=generator)
    rows[::10] = rows[0]
    queries = torch.cat([rows[:3], torch.randn(40, 24, generator=generator)])
    labels = torch.randint(6, (1100,), generator=generator)
    found: dict[str, Any] = {}
    for size in (1100, 500):
        split = Split(torch.arange(size)[:, None], labels[:size], "rows")

        def encode(numbers: torch.Tensor) -> torch.Tensor:
            return rows[numbers.flatten()]

        share = embed_share(encode, split, device=torch.device("cpu"), workers=0, ranks=ranks)
        found[f"{size} rows here"] = len(share.rows)
        found[f"nearest of {size}"] = knn.nearest(queries, share, 20)
        found[f"classes of {size}"] = knn.knn_predict(queries, share, labels[:size], num_classes=6)
    return found


def gradient_by_chunks(ranks: Ranks = ALONE) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss and the gradient of a batch, of which each process has encoded its rows by chunks."""
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5)).double()
    images, labels = torch.randn(2, 24, 7).double(), torch.arange(24) % 4
    own = slice(ranks.rank, None, ranks.world_size)
    images, labels = images[:, own], labels[own]
    loss = grad_cache_backward(
        ranks.parallel(network),
        images.flatten(0, 1).split(5),
        lambda rows: supcon_loss(rows.view(2, -1, 5).transpose(0, 1), labels, group=ranks.group),
    )
    return loss, [weight.grad for weight in network.parameters()]


class BatchNorm(nn.Module):
    """Batch norm alone, in the place of a network: keys have mean 0 in the batch that they are of."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))
        self.norm = nn.BatchNorm1d(3, affine=False)

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rows, self.norm(rows)


def rows_of(rank: int) -> torch.Tensor:
    """Those that a process makes keys of."""
    return torch.randn(16, 3, generator=torch.Generator().manual_seed(rank)) + rank


def keys(ranks: Ranks) -> list[torch.Tensor]:
    """The keys of this process's rows, shuffled among all and not."""
    encoder = MomentumEncoder(BatchNorm(), momentum=0.9, ranks=ranks)
    assert encoder.shuffles
    shuffled = encoder(rows_of(ranks.rank), step=5)
    encoder.shuffles = False
    return [shuffled, encoder(rows_of(ranks.rank), step=5)]


def outcome(act: Callable[[], object]) -> tuple[str, str]:
    """The kind and the text of the error that ends an act."""
    try:
        act()
    except (Exception, SystemExit) as error:
        return type(error).__name__, str(error)
    return "", ""


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    try:
        with joined(torch.device("cpu"), timeout_minutes=1) as ranks, patch("pretrain.draw"):
            torch.save(check_all(folder, ranks), folder / f"rank{ranks.rank}.pt")
            # One ends without a word in the middle of a run.
            if ranks.rank == 1:
                Trainer.loss = lambda *arguments: os._exit(0)
            run(folder, ranks, "--name=lost")
    except UserError as error:
        (folder / "lost.txt").write_text(str(error))


def main_of_three(folder: Path) -> None:
    """A run, which goes on once from a checkpoint, and two that end by a mistake."""
    torch.set_num_threads(1)
    options = [*CARRYING, "--batch_size=126"]

    def joined_run(*options: object, before: Callable[[Ranks], object]) -> None:
        with joined(torch.device("cpu"), timeout_minutes=1) as ranks, patch("pretrain.draw"):
            before(ranks)
            run(folder, ranks, *options)

    def begin(ranks: Ranks) -> None:
        warnings.warn("warned by all", stacklevel=1)
        whole = run(folder, ranks, *options, "--name=whole")
        ranks.from_rank_0(partial(shutil.copytree, whole, folder / "resumed"))

    def break_one(ranks: Ranks) -> None:
        if ranks.rank == 1:
            Trainer.loss = Mock(side_effect=UserError("no such image"))

    joined_run(*options, f"--resume={folder / 'resumed/step-12.pt'}", before=begin)
    found: dict[str, Any] = {
        "refused": outcome(partial(joined_run, before=lambda ranks: None)),
        "alone": outcome(partial(joined_run, *options, before=break_one)),
    }
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    found["threads"] = [name for name in names if "gloo" in name]
    torch.save(found, folder / f"rank{os.environ['RANK']}.pt")


def check_all(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """What this process finds."""
    found: dict[str, Any] = {"speaks": sys.stdout is sys.__stdout__}

    # Runs, each of which goes on once from a checkpoint in an epoch; and one that may not begin.
    for name, options in (("plain", CARRYING), ("queue", [*CARRYING, *QUEUE])):
        run_and_resume(folder, ranks, name, *options)
    with patch("supcon_kernels.small_stem.ResNet", SmallEncoder):
        run_and_resume(folder, ranks, "compiled", *CARRYING, "--compile=true")
    found["name taken"] = outcome(lambda: run(folder, ranks, "--name=plain"))

    config = options_of(image_size=8)
    images = torch.arange(4 * 64, dtype=torch.uint8).view(4, 1, 8, 8)
    views = build_views(config, load_data(config), ranks)
    found["view"] = views.random(images, step=1, view=0)

    # Steps, without augmentation, to be compared with those of one process.
    Views.random = plain_view
    for name, options in STEPS.items():
        trainer = train(options, ranks)
        found[name] = trainer.losses, trainer.state_dict()
    found["predictions"] = predictions(trainer, options)
    found["nearest"] = nearest(ranks)
    found["gradient"] = gradient_by_chunks(ranks)
    found["keys"] = keys(ranks)
    return found


def plain_view(views: Views, images: torch.Tensor, *, step: int, view: int) -> torch.Tensor:
    """In the place of a random one."""
    return views.plain(images)


if __name__ == "__main__":
    (main if os.environ["WORLD_SIZE"] == "2" else main_of_three)(Path(sys.argv[1]))
