"""Pretrain a ResNet with the supervised contrastive loss and say how good its embedding is.

python train/pretrain.py
python train/pretrain.py --dataset fashion_mnist --data_root DIR
python train/pretrain.py --config train/recipes/cifar10.yaml --resume auto

Without arguments it trains on scikit-learn's handwritten digits: real images, no network needed.
What it reaches there, in what time, on which hardware, with which versions and seeds, stands in
benchmarks/results/digits.csv, as measured by benchmarks/bench_digits.py.
"""

import json
import math
import shlex
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from augment import Views, build_views
from checkpoint import (
    LAST,
    RunState,
    check_same_run,
    describe_machine,
    load_newest,
    save_checkpoint,
)
from config import PretrainConfig, parse, pick_device, run_script, to_yaml
from data import ImageData, training_batches
from durable import replace_text, room_needed
from encoder import ENCODER, EXPORT, load_first_weights, write_encoder
from knn import embed, encode_stored, knn_accuracy, pixels
from model import Embedder, build_model
from optim import build_optimizer, build_schedule
from pictures import MAX_POINTS, draw_curves, draw_embedding
from report import Report
from requeue import Requests
from rundir import open_run
from seeds import random_state, set_random_state
from sources import load_data, subset
from supcon_kernels import supcon_loss

NUM_VIEWS = 2
DESCRIPTION = (__doc__ or "").split("\n", 1)[0]


def main(argv: list[str] | None = None) -> Path:
    """Run what the command line asks for; returns the folder of the run."""
    config = parse(PretrainConfig, argv, prog="train/pretrain.py", description=DESCRIPTION)
    return pretrain(config)


def pretrain(config: PretrainConfig) -> Path:
    """Train, evaluate and write one run; returns its folder."""
    # The data, in batches whose order is a pure function of (seed, epoch).
    device = pick_device(config.device)
    data = load_data(config)
    order, batches = training_batches(
        data.train, batch_size=config.batch_size, seed=config.seed, workers=config.workers
    )
    steps_per_epoch = len(order)
    total_steps = config.epochs * steps_per_epoch
    total_steps = min(total_steps, config.max_steps or total_steps)
    num_epochs = math.ceil(total_steps / steps_per_epoch)

    # The network, the random views that it sees, and how its weights move.
    torch.manual_seed(config.seed)
    model = build_model(config, channels=data.channels)
    model = model.to(device).to(memory_format=torch.channels_last)
    views = build_views(config, data)
    average: ModelEmaV3 | None = None
    if config.ema_decay is not None:
        average = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True)
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, config, steps_per_epoch, total_steps)

    # How good an embedding is, of the average of the weights where there is one: test images,
    # classified by their nearest training images.
    measured: Embedder = model if average is None else average.module
    knn = partial(
        knn_accuracy,
        test=data.test,
        bank=subset(data.train, config.knn_bank),
        num_classes=len(data.classes),
        device=device,
        workers=config.workers,
    )

    # A new run, or the state of one that stopped.
    folder, checkpoints = open_run(config)
    config = replace(config, name=folder.name, resume="none", image_size=data.image_size)
    machine = describe_machine(device)
    state: RunState | None = None
    if checkpoints:
        checkpoint, saved = load_newest(checkpoints)
        check_same_run(checkpoint, saved, config, machine)
        state = RunState(**saved["state"])
        model.load_state_dict(saved["model"])
        if average is not None:
            average.module.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        set_random_state(saved["random_state"], device)
    else:
        load_first_weights(model.encoder, config, channels=data.channels)
        if average is not None:
            average.set(model)

    with (
        room_needed(folder),
        Requests(folder) as requests,
        Report(folder, state, total_steps, NUM_VIEWS, config) as report,
    ):

        def save(*, best: bool = False) -> None:
            if state is None:
                return  # asked to leave during the first evaluation: there is nothing to lose
            # The records first: a checkpoint answers for every row up to its step.
            report.sync()
            save_checkpoint(
                folder,
                state,
                keep=config.keep,
                best=best,
                config=asdict(config),
                machine=machine,
                model=model.state_dict(),
                ema=None if average is None else average.module.state_dict(),
                optimizer=optimizer.state_dict(),
                random_state=random_state(device),
                data={
                    "classes": data.classes,
                    "channels": data.channels,
                    "stored_size": data.train.stored_size,
                    "mean": data.mean,
                    "std": data.std,
                },
            )

        def encode(images: Tensor) -> Tensor:
            # An evaluation may take minutes. It changes nothing, and starts again another time.
            requests.check(save)
            return encode_stored(measured, views, images)

        replace_text(folder / "config.yaml", to_yaml(config))
        if state is None:
            untrained = knn(encode)
            state = RunState(raw_pixels=knn(pixels), untrained=untrained, accuracy=untrained)
            report.accuracy(state)
        print(describe(folder, data, device, state), flush=True)

        while state.epoch < num_epochs:
            # Begun in its middle where the run stopped; perhaps its evaluation alone is left.
            order.begin(state.epoch, state.step - state.epoch * steps_per_epoch)
            model.train()
            with report.clock("training"):
                for images, labels in islice(batches, total_steps - state.step):
                    schedule.step_update(state.step)
                    images, labels = images.to(device), labels.to(device)
                    loss = contrastive_loss(model, views, images, labels, state.step, config)
                    optimizer.zero_grad()
                    loss.backward()
                    if config.clip_grad is not None:
                        nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
                    optimizer.step()
                    state.step += 1
                    if average is not None:
                        average.update(model, step=state.step)
                    report.step(state, optimizer, loss)
                    if is_due(state.step, config.save_every):
                        save()
                    requests.check(save)
            evaluated = is_due(state.epoch + 1, config.knn_every) or state.epoch + 1 == num_epochs
            if evaluated:
                with report.clock("evaluation"):
                    state.accuracy = knn(encode)
            state.epoch += 1
            best = evaluated and state.accuracy > state.best
            if best:
                state.best = state.accuracy
            report.end_epoch(state, evaluated=evaluated)
            save(best=best)

        points = subset(data.test, MAX_POINTS)
        features = embed(encode, points, device=device, workers=config.workers)
        title = f"{folder.name}: test images, k-NN {state.accuracy:.2%}"
        draw_embedding(features, points.labels, data.classes, folder / "embedding.png", title)
        draw_curves(folder / "metrics.csv", folder / "curves.png", folder.name, state)
        write_results(folder, config, data, state, measured)
    return folder


def is_due(count: int, every: int) -> bool:
    """Whether something done `every` so many steps or epochs (0: never) is due after `count`."""
    return every > 0 and count % every == 0


def contrastive_loss(
    model: Embedder, views: Views, images: Tensor, labels: Tensor, step: int, config: PretrainConfig
) -> Tensor:
    """The loss of one batch: (B, C, S, S) uint8 images and (B,) labels, seen in random views."""
    seen = [views.random(images, step=step, view=view) for view in range(NUM_VIEWS)]
    features = model(torch.cat(seen)).unflatten(0, (NUM_VIEWS, -1)).transpose(0, 1)
    return supcon_loss(
        features,
        labels if config.method == "supcon" else None,
        temperature=config.temperature,
    )


def describe(folder: Path, data: ImageData, device: torch.device, state: RunState) -> str:
    """A few words on a run that begins or goes on."""
    verb = f"going on after step {state.step} in" if state.step else "writing to"
    return (
        f"{len(data.train)} training and {len(data.test)} test images of {len(data.classes)} "
        f"classes, {data.channels}x{data.image_size}x{data.image_size}, on {device.type}; "
        f"{verb} {folder}\n"
        f"k-NN to beat: raw pixels {state.raw_pixels:.2%}, "
        f"untrained encoder {state.untrained:.2%}"
    )


def write_results(
    folder: Path,
    config: PretrainConfig,
    data: ImageData,
    state: RunState,
    model: Embedder,
) -> None:
    """Write the encoder and the numbers, and say where everything is."""
    write_encoder(folder, model.encoder, config, data)
    numbers = {
        "knn_accuracy": state.accuracy,
        "knn_raw_pixels": state.raw_pixels,
        "knn_untrained": state.untrained,
        "epochs": state.epoch,
        "steps": state.step,
    }
    replace_text(folder / "results.json", json.dumps(numbers, indent=2) + "\n")
    print(
        f"\nk-NN {state.accuracy:.2%} on {len(data.test)} test images "
        f"(raw pixels {state.raw_pixels:.2%}, untrained encoder {state.untrained:.2%})\n"
        f"checkpoint    {folder / LAST}\n"
        f"encoder       {folder / ENCODER}  {folder / EXPORT}\n"
        f"pictures      {folder / 'curves.png'}  {folder / 'embedding.png'}\n"
        f"numbers       {folder / 'results.json'}  {folder / 'metrics.csv'}\n"
        f"linear stage  python train/linear.py --checkpoint {shlex.quote(str(folder / LAST))}"
    )


if __name__ == "__main__":
    run_script(main, if_interrupted="(--resume auto goes on from the last checkpoint)")
