"""Pretrain a ResNet with the supervised contrastive loss and say how good its embedding is.

python train/pretrain.py
python train/pretrain.py --dataset fashion_mnist --data_root DIR
python train/pretrain.py --config train/recipes/cifar10.yaml --resume auto
torchrun --nproc-per-node 8 train/pretrain.py ...

Without arguments it trains on scikit-learn's handwritten digits: real images, no network needed.
What it reaches there, in what time, on which hardware, with which versions and seeds, stands in
benchmarks/results/digits.csv, as measured by benchmarks/bench_digits.py.
"""

import json
import math
import shlex
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from data.batches import training_batches
from data.images import ImageData
from data.sources import load_data
from data.views import Views, training_images
from evaluation.evaluator import Evaluation, Tested
from evaluation.pictures import (
    MAX_POINTS,
    PICTURES,
    draw_confusion,
    draw_curves,
    draw_embedding,
    fonts_for,
)
from network.weights import ENCODER, EXPORT, load_first_weights, write_encoder
from run.atomic_write import explain_full_disk, replace_text
from run.checkpoint import (
    LAST,
    RunState,
    check_same_data,
    check_same_run,
    describe_machine,
    load_newest,
    restored_from,
    save_checkpoint,
)
from run.command_line import parse, run_script
from run.config import PretrainConfig, to_yaml
from run.device import pick_device
from run.errors import UserError
from run.folder import RunLock, open_run, removed_if_empty
from run.out_of_memory import memory_for
from run.processes import ALONE, Ranks, joined, local_rank_0_speaks
from run.records import Report
from run.requeue import Requests
from run.seeds import random_state, set_random_state
from training.optimizer import build_schedule
from training.trainer import Trainer

# What decides how much memory a step takes.
SIZES = ("batch_size", "num_views", "image_size", "model", "width", "grad_cache_chunk")
DESCRIPTION = (__doc__ or "").split("\n", 1)[0]


def main(argv: list[str] | None = None) -> Path:
    """Run what the command line asks for; returns the folder of the run."""
    with local_rank_0_speaks():
        config = parse(PretrainConfig, argv, prog="train/pretrain.py", description=DESCRIPTION)
        device = pick_device(config.device)
    with joined(device, timeout_minutes=config.timeout_minutes) as ranks:
        return pretrain(config, ranks.own_device(device), ranks)


def pretrain(config: PretrainConfig, device: torch.device, ranks: Ranks = ALONE) -> Path:
    """Train, evaluate and write one run; returns its folder. Every process of it makes the call."""
    # The data, in batches whose order is a pure function of (seed, epoch).
    with ranks.local_rank_0_first(), memory_for(config, "image_size"):
        data = load_data(config)
    order, batches = training_batches(
        training_images(config, data),
        batch_size=config.batch_size,
        seed=config.seed,
        workers=config.workers,
        classes_per_batch=config.classes_per_batch,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=device,
    )
    steps_per_epoch = len(order)
    total_steps = length_of(config, steps_per_epoch)
    num_epochs = math.ceil(total_steps / steps_per_epoch)

    with memory_for(config, "model", "width"):
        trainer = Trainer(
            config,
            data,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
            device=device,
            ranks=ranks,
        )

    # A new run, or the state of one that stopped, which no other process may write to.
    with RunLock() as lock:
        folder, checkpoints = ranks.from_rank_0(partial(open_run, config, lock))
        config = replace(config, name=folder.name, resume="none", image_size=data.image_size)
        state: RunState | None = None
        with removed_if_empty(folder) if ranks.is_rank_0 else nullcontext():
            if checkpoints:
                state, config = resume(
                    trainer, checkpoints, config, data, steps_per_epoch=steps_per_epoch
                )
            else:
                begin(trainer, config, data)

        with (
            explain_full_disk(folder),
            memory_for(config, *SIZES),
            Requests(folder, ranks) as requests,
            Report(
                folder, state, total_steps, config, trainer.clock, writes=ranks.is_rank_0
            ) as report,
        ):

            def save(*, best: bool = False) -> None:
                if state is None:
                    return  # asked to leave during the first evaluation: there is nothing to lose
                # The records first: a checkpoint answers for every row up to its step.
                report.sync(state)
                write_checkpoint(folder, config, data, state, trainer, best=best)

            chooses = data.validation is not None
            evaluation = Evaluation(trainer, data, before_batch=partial(requests.check, save))
            if ranks.is_rank_0:
                replace_text(folder / "config.yaml", to_yaml(config))
            if state is None:
                state = evaluation.baselines()
                report.accuracy(state)
            print(describe(folder, data, device, state), flush=True)

            while state.epoch < num_epochs:
                # Begun in its middle where the run stopped; perhaps its evaluation alone is left.
                order.begin(state.epoch, state.step - state.epoch * steps_per_epoch)
                trainer.model.train()
                evaluation.weights_move()
                with report.clock("training"):
                    for images, labels in islice(batches, total_steps - state.step):
                        loss = trainer.step(images, labels, state.step)
                        state.step += 1
                        report.step(state, trainer, loss)
                        if is_due(state.step, config.save_every):
                            save()
                        requests.check(save, step=state.step)
                        trainer.clock.mark("records")
                evaluated = (
                    is_due(state.epoch + 1, config.knn_every) or state.epoch + 1 == num_epochs
                )
                if evaluated:
                    with report.clock("evaluation"):
                        evaluation.measure(state)
                state.epoch += 1
                best = chooses and evaluated and state.accuracy > state.best
                if best:
                    state.best = state.accuracy
                report.end_epoch(state, evaluated=evaluated)
                save(best=best)

            tested = evaluation.at_the_end(num_drawn=MAX_POINTS)
            if ranks.is_rank_0:
                draw(folder, data, state, tested)
                write_encoder(folder, trainer.measured.encoder, config, data)
                write_results(folder, data, state, tested)
    return folder


def begin(trainer: Trainer, config: PretrainConfig, data: ImageData) -> None:
    """Give a new run the weights that it starts from."""
    encoder = trainer.model.encoder
    trainer.ranks.from_rank_0(
        partial(load_first_weights, encoder, config, channels=data.channels),
    )
    trainer.ranks.broadcast(trainer.model.state_dict().values())
    trainer.restart_averages()


def resume(
    trainer: Trainer,
    checkpoints: list[Path],
    config: PretrainConfig,
    data: ImageData,
    *,
    steps_per_epoch: int,
) -> tuple[RunState, PretrainConfig]:
    """Put a trainer where the newest whole checkpoint of its run was written.

    Returns:
        The state of the run, and its config, which may say that it is longer or shorter than it was.
    """
    machine = describe_machine(trainer.device, trainer.ranks.world_size)
    total_steps = length_of(config, steps_per_epoch)

    def restore(path: Path, saved: dict[str, Any]) -> None:
        check_same_run(path, saved, with_its_warmup(config, saved), machine)
        check_same_data(path, saved, describe_data(data, trainer.views))
        with restored_from(path):
            state = RunState(**saved["state"])
            last = length_of(PretrainConfig(**saved["config"]), steps_per_epoch)
            begin, end = (
                min(epoch * steps_per_epoch, last) for epoch in (state.epoch, state.epoch + 1)
            )
            if not begin <= state.step <= end:
                raise ValueError(f"its step {state.step} is not in its epoch {state.epoch}")
            restore_trainer(trainer, saved)
        if state.step > total_steps:
            raise UserError(
                f"cannot resume {path}: it has made {state.step} steps, and --epochs "
                f"{config.epochs}, --max_steps {config.max_steps} end after {total_steps}"
            )
        if mistakes := with_its_warmup(config, saved).mistakes():
            raise UserError(f"cannot resume {path}: {'; '.join(mistakes)}")

    # Others than the first go on from what it found to be whole.
    saved = trainer.ranks.from_rank_0(partial(load_newest, checkpoints, restore))
    if not trainer.ranks.is_rank_0:
        restore_trainer(trainer, saved)
    config, state = with_its_warmup(config, saved), RunState(**saved["state"])
    trainer.schedule = build_schedule(trainer.optimizer, config, steps_per_epoch, total_steps)
    if total_steps != length_of(PretrainConfig(**saved["config"]), steps_per_epoch):
        # An epoch that was cut short, or is now the last, is not over: it is evaluated at its end.
        last_epoch = math.ceil(total_steps / steps_per_epoch) - 1
        state.epoch = min(state.epoch, state.step // steps_per_epoch, last_epoch)
    return state, config


def length_of(config: PretrainConfig, steps_per_epoch: int) -> int:
    """The steps that a run makes."""
    num_steps = config.epochs * steps_per_epoch
    return min(num_steps, config.max_steps or num_steps)


def with_its_warmup(config: PretrainConfig, saved: dict[str, Any]) -> PretrainConfig:
    """The config with the warm-up of the run that goes on, unless it asks for another."""
    if config.warmup_epochs != config.default_warmup_epochs:
        return config
    return replace(config, warmup_epochs=saved["config"]["warmup_epochs"])


def restore_trainer(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Give a trainer, and the generators of random numbers, the state in a checkpoint."""
    trainer.load_state_dict(saved)
    # One for each process.
    states = saved.get("random_states") or [saved["random_state"]]
    set_random_state(states[trainer.ranks.rank], trainer.device)


def write_checkpoint(
    folder: Path,
    config: PretrainConfig,
    data: ImageData,
    state: RunState,
    trainer: Trainer,
    *,
    best: bool,
) -> None:
    """Save all that `resume` and the linear stage need, on the first process."""
    random_states = trainer.ranks.all_gather(random_state(trainer.device))
    if not trainer.ranks.is_rank_0:
        return
    save_checkpoint(
        folder,
        state,
        keep=config.keep,
        best=best,
        config=asdict(config),
        machine=describe_machine(trainer.device, trainer.ranks.world_size),
        random_states=random_states,
        data=describe_data(data, trainer.views),
        **trainer.state_dict(),
    )


def describe_data(data: ImageData, views: Views) -> dict[str, Any]:
    """What a checkpoint says of the images that it was trained on."""
    return {
        "classes": data.classes,
        "num_images": len(data.train),
        "channels": data.channels,
        "stored_size": data.train.stored_size,
        "mean": data.mean,
        "std": data.std,
        "views": views.traits,
        "order": data.train.order,
    }


def is_due(count: int, every: int) -> bool:
    """Whether something done `every` so many steps or epochs (0: never) is due after `count`."""
    return every > 0 and count % every == 0


def describe(folder: Path, data: ImageData, device: torch.device, state: RunState) -> str:
    """A few words on a run that begins or goes on."""
    verb = f"going on after step {state.step} in" if state.step else "writing to"
    held_out = "" if data.validation is None else f", {len(data.validation)} validation"
    return (
        f"{len(data.train)} training{held_out} and {len(data.test)} test images of "
        f"{len(data.classes)} classes, {data.channels}x{data.image_size}x{data.image_size}, on "
        f"{device.type}; {verb} {folder}\n"
        f"k-NN to beat on {watched(data)} images: raw pixels {state.raw_pixels:.2%}, "
        f"untrained encoder {state.untrained:.2%}"
    )


def watched(data: ImageData) -> str:
    """What the images are called that k-NN is measured on during a run."""
    return "test" if data.validation is None else "validation"


def draw(folder: Path, data: ImageData, state: RunState, tested: Tested) -> None:
    """Draw the curves of a run, how it embeds test images, and which classes k-NN confuses."""
    with fonts_for([folder.name, *data.classes]) as fit:
        name, classes = fit(folder.name), [fit(name) for name in data.classes]
        title = f"{name}: test images, k-NN {tested.knn_accuracy:.2%}"
        points = tested.embeddings, tested.labels
        draw_embedding(*points, classes, folder / "embedding.png", title)
        labels = data.test.labels
        draw_confusion(tested.predictions, labels, classes, folder / "confusion.png", title)
        curves = folder / "curves.png"
        draw_curves(folder / "metrics.csv", curves, name, state, images=watched(data))


def write_results(folder: Path, data: ImageData, state: RunState, tested: Tested) -> None:
    """Write the numbers, and say where everything is."""
    numbers = {
        "evaluated_on": watched(data),
        "knn_accuracy": state.accuracy,
        "knn_raw_pixels": state.raw_pixels,
        "knn_untrained": state.untrained,
        "probe_accuracy": state.probe,
        "test_knn_accuracy": tested.knn_accuracy,
        "test_probe_accuracy": tested.probe_accuracy,
        "epochs": state.epoch,
        "steps": state.step,
        "skipped_steps": state.skipped,
    }
    numbers = {name: value for name, value in numbers.items() if value is not None}
    replace_text(folder / "results.json", json.dumps(numbers, indent=2) + "\n")
    validation = ""
    if data.validation is not None:
        validation = f"k-NN {state.accuracy:.2%} on {len(data.validation)} validation images\n"
    print(
        f"\n{validation}"
        f"k-NN {tested.knn_accuracy:.2%} on {len(data.test)} test images\n"
        f"to beat on {watched(data)} images: raw pixels {state.raw_pixels:.2%}, untrained encoder "
        f"{state.untrained:.2%}\n"
        f"checkpoint    {folder / LAST}\n"
        f"encoder       {folder / ENCODER}  {folder / EXPORT}\n"
        f"pictures      {'  '.join(str(folder / name) for name in PICTURES)}\n"
        f"numbers       {folder / 'results.json'}  {folder / 'metrics.csv'}\n"
        f"linear stage  python train/linear.py --checkpoint {shlex.quote(str(folder / LAST))}"
    )


if __name__ == "__main__":
    run_script(main, if_interrupted="(--resume auto goes on from the last checkpoint)")
