"""What the driver adds to a training step, and what a plain loop does in the same time: images a second.

python benchmarks/bench_train.py --data-root DIR writes train_cpu.csv; DIR holds
Fashion-MNIST (Debian's package dataset-fashion-mnist, or torchvision's folders). Without it the
images are scikit-learn's digits. Five loops train one
network on it and take turns in one run:

bare              forward, loss, backward and optimiser on batches that lie ready
driver_crop_flip  train/pretrain.py's own loop, records included; its views are crops and flips
driver_simclr     the same with SimCLR's change of colours
plain_crop_flip   a loop in the manner of SupContrast's main_supcon.py: PIL images transformed one by
                  one in DataLoader workers, channels first, the dense loss
plain_simclr      the same with the change of colours

--options times instead the driver with an option changed, beside bare and itself:

driver_channels_first  --no_channels_last
driver_bf16            --precision bf16
driver_compiled        --compile
driver_bf16_compiled   both, with --device cuda

With --device cuda every loop trains there, and is waited for before and after each of its turns.

A round of a plain loop holds all the work of its steps: its workers begin with it and idle after it.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

from measuring.machine import REPOSITORY, describe_machine
from measuring.providers import dense_loss
from measuring.workloads import Problem, Workload
from reporting.rows import add_output_options, results_path, write_table

sys.path.insert(0, str(REPOSITORY / "train"))

from data.batches import training_batches
from data.images import ImageData, Split
from data.sources import load_data
from data.views import build_views
from network.embedder import build_model
from run.checkpoint import RunState
from run.device import DeviceOptions, set_arithmetic
from run.options import PretrainOptions
from run.records import Report
from supcon_kernels import supcon_loss
from training.build import build_trainer
from training.divergence import DivergenceCheck
from training.optimizer import build_optimizer

NUM_READY = 8
TURN_STEPS = 4
DRIVER_OVER_BARE, DRIVER_OVER_PLAIN, MAX_SHARE = 0.95, 1.3, 0.03
"""The goals: least ratios of speed, and the most of a step that the loss and the data may take."""


class Bare:
    """The least that a step can be: nothing but the network, the loss and the optimiser."""

    def __init__(self, options: PretrainOptions, data: ImageData) -> None:
        seed = options.seeds.seed
        torch.manual_seed(seed)
        self.temperature = options.method.temperature
        device = torch.device(options.device.device)
        self.model = build_model(
            options.network, channels=data.channels, image_size=data.image_size
        )
        self.model.to(device).to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(options.optimizer, self.model)
        _, loader = training_batches(data.train, options.batches, seed=seed)
        views = build_views(options.views, data, seed=seed)
        self.ready = cycle(
            (
                torch.cat([views.random(images, step=step, view=v) for v in (0, 1)]).to(device),
                labels.to(device),
            )
            for step, (images, labels) in enumerate(islice(loader, NUM_READY))
        )

    def run(self, num_steps: int) -> None:
        self.model.train()
        for images, labels in islice(self.ready, num_steps):
            _, rows = self.model(images)
            features = rows.unflatten(0, (2, -1)).transpose(0, 1)
            loss = supcon_loss(features, labels, temperature=self.temperature)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


class Driver:
    """The training loop of train/pretrain.py, between its checkpoints."""

    def __init__(self, options: PretrainOptions, data: ImageData, stack: ExitStack) -> None:
        self.order, self.loader = training_batches(
            data.train,
            options.batches,
            seed=options.seeds.seed,
            device=torch.device(options.device.device),
        )
        self.trainer = build_trainer(
            options,
            data,
            steps_per_epoch=len(self.order),
            device=torch.device(options.device.device),
        )
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        method = self.trainer.method
        # Its progress is written as in a run, where nobody reads it.
        with redirect_stdout(io.StringIO()):
            report = Report(
                folder,
                None,
                options,
                total_steps=options.schedule.total_steps(len(self.order)),
                divergence=DivergenceCheck(method.collapsed_loss, scale=method.scale),
                phases=self.trainer.clock,
            )
        self.report = stack.enter_context(report)
        self.state = RunState(raw_pixels=0.0, untrained=0.0, accuracy=0.0)
        self.batches = self._batches()
        self.seconds: dict[str, float] = {}

    def _batches(self) -> Iterator[Any]:
        while True:
            self.order.begin(self.state.epoch)
            yield from self.loader
            self.state.epoch += 1

    def run(self, num_steps: int) -> None:
        self.trainer.model.train()
        with redirect_stdout(io.StringIO()), self.report.clock("training"):
            for images, labels in islice(self.batches, num_steps):
                loss = self.trainer.step(images, labels, self.state.step)
                self.state.step += 1
                self.report.step(
                    self.state, self.trainer.learning_rate, loss, self.trainer.gradient_norm
                )
                self.trainer.clock.mark("records")
        for phase, seconds in self.trainer.clock.read().items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def share(self, phase: str) -> float:
        """Of the time of all steps run."""
        return self.seconds[phase] / sum(self.seconds.values())


class PilViews(Dataset[tuple[Tensor, Tensor, int]]):
    """Two random views of each image, transformed as PIL images."""

    def __init__(self, split: Split, transform: Callable[[Image.Image], Tensor]) -> None:
        assert isinstance(split.images, Tensor)
        self.images = [transforms.functional.to_pil_image(image) for image in split.images]
        self.labels = split.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        image = self.images[index]
        return self.transform(image), self.transform(image), self.labels[index]


class Plain:
    """What one writes first, in the manner of SupContrast's main_supcon.py."""

    def __init__(self, options: PretrainOptions, data: ImageData, *, colours: bool) -> None:
        torch.manual_seed(options.seeds.seed)
        self.batches = options.batches
        num_rows, temperature = 2 * options.batches.batch_size, options.method.temperature
        self.workload = Workload(num_rows, temperature=temperature)
        self.device = torch.device(options.device.device)
        self.model = build_model(
            replace(options.network, channels_last=False), channels=data.channels
        ).to(self.device)
        self.optimizer = build_optimizer(options.optimizer, self.model)
        jitter = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
        change = [transforms.RandomApply([jitter], p=0.8), transforms.RandomGrayscale(p=0.2)]
        self.dataset = PilViews(
            data.train,
            transforms.Compose(
                [
                    transforms.RandomResizedCrop(data.image_size, scale=(0.2, 1.0)),
                    transforms.RandomHorizontalFlip(),
                    *(change if colours else []),
                    transforms.ToTensor(),
                    transforms.Normalize(data.mean, data.std),
                ]
            ),
        )
        self.loaders: dict[int, DataLoader[Any]] = {}

    def run(self, num_steps: int) -> None:
        self.model.train()
        for first, second, labels in self._loader(num_steps):
            images = torch.cat([first, second]).to(self.device, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True)
            _, rows = self.model(images)
            loss = dense_loss(Problem(self.workload, rows, labels.repeat(2)))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()  # for its meter

    def _loader(self, num_steps: int) -> DataLoader[Any]:
        # So many batches that the workers, which stay, have nothing left to do after the round.
        if num_steps not in self.loaders:
            num_images = num_steps * self.batches.batch_size
            workers = self.batches.workers
            self.loaders[num_steps] = DataLoader(
                self.dataset,
                batch_size=self.batches.batch_size,
                sampler=RandomSampler(self.dataset, num_samples=num_images),
                num_workers=workers,
                persistent_workers=workers > 0,
                pin_memory=self.device.type == "cuda",
            )
        return self.loaders[num_steps]


Loop = Bare | Driver | Plain


def build_loops(
    options: PretrainOptions, data: ImageData, stack: ExitStack, *, of_options: bool
) -> dict[str, Loop]:
    """The loops, each with a network of its own from one seed; the driver's load their own data."""
    options = options.changed(augment="crop_flip")
    alone = options.changed(workers=0)
    loops: dict[str, Loop] = {
        "bare": Bare(alone, data),
        "driver_crop_flip": Driver(alone, data, stack),
    }
    if of_options:
        changes: dict[str, dict[str, Any]] = {
            "channels_first": {"channels_last": False},
            "bf16": {"precision": "bf16"},
            "compiled": {"compile": True},
        }
        if options.device.device == "cuda":
            changes["bf16_compiled"] = {"precision": "bf16", "compile": True}
        for name, change in changes.items():
            loops[f"driver_{name}"] = Driver(alone.changed(**change), data, stack)
        return loops
    return loops | {
        "driver_simclr": Driver(alone.changed(augment="simclr"), data, stack),
        "plain_crop_flip": Plain(options, data, colours=False),
        "plain_simclr": Plain(options, data, colours=True),
    }


def time_loops(
    loops: dict[str, Loop], *, num_steps: int, num_rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every round's `num_steps` steps of each loop, each first in its round in turn.

    Loops without workers take turns of TURN_STEPS: a machine's speed drifts within a round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    names = list(loops)
    for loop in loops.values():
        loop.run(num_steps)  # the workers start, memory is found
        if isinstance(loop, Driver):
            loop.seconds.clear()
    for round_ in range(num_rounds):
        first = round_ % len(names)
        spent = dict.fromkeys((*names[first:], *names[:first]), 0.0)
        for done in range(0, num_steps, TURN_STEPS):
            for name in spent:
                is_plain = isinstance(loops[name], Plain)
                if is_plain and done > 0:
                    continue
                _wait(device)
                began = time.perf_counter()
                loops[name].run(num_steps if is_plain else min(TURN_STEPS, num_steps - done))
                _wait(device)
                spent[name] += time.perf_counter() - began
        for name, each in spent.items():
            seconds[name].append(each)
    return seconds


def _wait(device: torch.device) -> None:
    """Until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rows_of(
    loops: dict[str, Loop], seconds: dict[str, list[float]], images_per_round: int
) -> list[dict[str, str]]:
    """A row for each loop: its speed, and how it compares with others in the same rounds."""
    rows = []
    for name, loop in loops.items():
        rates = [images_per_round / each for each in seconds[name]]
        row = {
            "loop": name,
            "images_per_second": f"{median(rates):.1f}",
            "slowest": f"{min(rates):.1f}",
            "fastest": f"{max(rates):.1f}",
            "over_bare": _ratio(seconds, name, "bare"),
            "over_plain": "",
            "loss_share": "",
            "data_share": "",
            "views_share": "",
        }
        if isinstance(loop, Driver):
            if (plain := name.replace("driver", "plain")) in loops:
                row["over_plain"] = _ratio(seconds, name, plain)
            for phase in ("loss", "data", "views"):
                row[f"{phase}_share"] = f"{loop.share(phase):.4f}"
        rows.append(row)
    return rows


def shares_of(row: dict[str, str]) -> str:
    """What a driver's step spends on data, views and loss, in words."""
    parts = [(name, row[f"{name}_share"]) for name in ("data", "views", "loss")]
    return "".join(f", {name} {float(share):.1%}" for name, share in parts if share)


def _ratio(seconds: dict[str, list[float]], name: str, other: str) -> str:
    """The median of how many times as fast as `other` a loop was in the same round."""
    return f"{median(theirs / ours for ours, theirs in zip(seconds[name], seconds[other])):.4f}"


def goals(row: dict[str, str]) -> list[tuple[str, bool]]:
    """What the driver with crops and flips is to reach, in words, and whether it does."""
    over_bare, over_plain = float(row["over_bare"]), float(row["over_plain"])
    shares = [(name, float(row[f"{name}_share"])) for name in ("loss", "data")]
    return [
        (f"{over_bare:.3f} of bare, at least {DRIVER_OVER_BARE}", over_bare >= DRIVER_OVER_BARE),
        (f"{over_plain:.2f} of plain, at least {DRIVER_OVER_PLAIN}", over_plain >= DRIVER_OVER_PLAIN),
        *((f"{name} {part:.2%} of a step, below {MAX_SHARE:.0%}", part < MAX_SHARE) for name, part in shares),
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--data-root", metavar="DIR", help="the folder of Fashion-MNIST; default: digits"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--image-sizes", type=int, nargs="+", default=[16])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument(
        "--workers", type=int, default=2, help="DataLoader workers of the plain loops"
    )
    parser.add_argument("--steps", type=int, default=20, help="steps in a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tf32", action="store_true", help="of every loop, on CUDA")
    parser.add_argument("--options", action="store_true", help="time the driver's options instead")
    add_output_options(parser)
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    set_arithmetic(DeviceOptions(tf32=options.tf32), device)
    machine = describe_machine(options.device)
    measured = []
    for size in options.image_sizes:
        of_driver = PretrainOptions().changed(
            dataset="fashion_mnist" if options.data_root else "digits",
            data_root=options.data_root, image_size=size,
            model=options.model, width=options.width, batch_size=options.batch_size,
            workers=options.workers, epochs=1000, device=options.device,
            # Every loop at one rate, and a low one: weights that diverge compute in denormals.
            learning_rate=0.01, warmup_epochs=0,
        )  # fmt: skip
        about = {"image_size": size, "model": options.model, "width": options.width}
        about |= {"batch_size": options.batch_size, "num_views": of_driver.views.num_views}
        about |= {"steps_per_round": options.steps, "num_rounds": options.rounds}
        about |= {"plain_workers": options.workers, "tf32": "yes" if options.tf32 else "no"}
        with ExitStack() as stack:
            data = load_data(of_driver.data)
            loops = build_loops(of_driver, data, stack, of_options=options.options)
            seconds = time_loops(
                loops, num_steps=options.steps, num_rounds=options.rounds, device=device
            )
        rows = rows_of(loops, seconds, options.steps * options.batch_size)
        measured += [row | about | machine for row in rows]
        for row in rows:
            print(
                f"{size:3} px  {row['loop']:16}  {float(row['images_per_second']):8.0f} images/s  "
                f"{row['over_bare']} of bare{shares_of(row)}"
            )
        for words, reached in [] if options.options else goals(rows[1]):
            print(f"{size:3} px  driver_crop_flip: {words}: {'reached' if reached else 'MISSED'}")
    name = f"train_{'options_' if options.options else ''}{options.device}.csv"
    write_table(results_path(name, options.output_dir, options.update), measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
