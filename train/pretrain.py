"""Train an image encoder with the supervised contrastive loss, and measure its embeddings.

python train/pretrain.py
python train/pretrain.py --dataset fashion_mnist --data_root DIR
python train/pretrain.py --config train/recipes/cifar10.yaml --resume auto
torchrun --nproc-per-node 8 train/pretrain.py ...

Without arguments it trains on scikit-learn's handwritten digits: real images, no network needed.
What it reaches there, in what time, on which hardware, with which versions and seeds, stands in
benchmarks/results/digits.csv, as measured by benchmarks/bench_digits.py.
"""

import run.quiet_interrupt  # noqa: F401  before all that takes long to import

# isort: split

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from data.batches import Batches, training_batches
from data.images import ImageData
from data.order import TrainingOrder
from data.sources import load_data
from data.views import training_images
from evaluation.evaluator import Evaluator
from evaluation.pictures import MAX_POINTS
from evaluation.summary import describe, draw, say_what_is_next, write_results
from network.embedder import encoder_recipe
from network.weights import load_encoder, load_pretrained, write_encoder
from run.atomic_write import explain_full_disk, replace_text
from run.checkpoint import RunState
from run.command_line import parse, run_script
from run.compiler_caches import keep_caches_local
from run.device import pick_device, set_arithmetic
from run.folder import RunLock, open_folder, removed_if_empty
from run.options import PretrainOptions, to_yaml
from run.out_of_memory import out_of_memory_names
from run.processes import ALONE, Ranks, joined, local_rank_0_speaks
from run.records import Report
from run.requeue import Requests
from run.resume import resume, write_checkpoint
from run.saved_run import open_encoder
from training.build import build_trainer
from training.divergence import DivergenceCheck
from training.memory import say_memory
from training.trainer import Trainer

DESCRIPTION = (__doc__ or "").split("\n", 1)[0]


def main(argv: list[str] | None = None) -> Path:
    """Run what the command line asks for; returns the folder of the run."""
    with local_rank_0_speaks():
        options = parse(PretrainOptions, argv, prog="train/pretrain.py", description=DESCRIPTION)
        options.logging.check_installed()
        device = pick_device(options.device.device)
    with joined(device, timeout_minutes=options.device.timeout_minutes) as ranks:
        set_arithmetic(options.device, device)
        if device.type == "cuda" or options.step.compile:
            keep_caches_local()
        return pretrain(options, ranks.own_device(device), ranks)


def pretrain(options: PretrainOptions, device: torch.device, ranks: Ranks = ALONE) -> Path:
    """Train, evaluate and write one run; returns its folder. Every process of it makes the call."""
    with RunLock() as lock:
        folder, checkpoints = ranks.from_rank_0(
            partial(open_folder, options.folder, options.default_name, lock)
        )
        with removed_if_empty(folder) if ranks.is_rank_0 else nullcontext():
            run = set_up(options, folder, checkpoints, device, ranks)
            train(run)
    return folder


@dataclass
class Run:
    """What a run consists of. Its state is None until its network was evaluated untrained."""

    options: PretrainOptions
    folder: Path
    data: ImageData
    order: TrainingOrder
    batches: Batches
    trainer: Trainer
    state: RunState | None = None

    @property
    def total_steps(self) -> int:
        """From its first step to its last."""
        return self.options.schedule.total_steps(len(self.order))

    @property
    def num_epochs(self) -> int:
        """The last of which may be cut short."""
        return math.ceil(self.total_steps / len(self.order))


def set_up(
    options: PretrainOptions,
    folder: Path,
    checkpoints: list[Path],
    device: torch.device,
    ranks: Ranks,
) -> Run:
    """Put a run together, anew or where the newest of some checkpoints was written."""
    seed = options.seeds.seed
    with ranks.local_rank_0_first(), out_of_memory_names(image_size=options.data.image_size):
        data = load_data(options.data, seed=seed)
    # Batches in an order that is a pure function of (seed, epoch).
    images = training_images(options.views, data, seed=seed)
    order, batches = training_batches(
        images, options.batches, seed=seed, ranks=ranks, device=device
    )
    # Of several processes each makes a first backward there, of as many rows as a step has.
    with out_of_memory_names(**sizes(options)):
        trainer = build_trainer(
            options, data, steps_per_epoch=len(order), device=device, ranks=ranks
        )
    if ranks.is_rank_0:
        say_memory(options, data, trainer)
    options = options.changed(name=folder.name, resume="none", image_size=data.image_size)
    run = Run(options, folder, data, order, batches, trainer)
    if checkpoints:
        run.state, run.options = resume(
            trainer, checkpoints, options, data, steps_per_epoch=len(order)
        )
    else:
        ranks.from_rank_0(partial(load_first_weights, run))
        ranks.broadcast(trainer.model.state_dict().values())
        trainer.restart_averages()
    return run


def load_first_weights(run: Run) -> None:
    """Give the encoder of a new run the weights that --pretrained or --init_from names, if any."""
    start, encoder = run.options.start, run.trainer.model.encoder
    name, arguments = encoder_recipe(
        run.options.network, channels=run.data.channels, image_size=run.data.image_size
    )
    about = {"model": name, **arguments}
    if start.pretrained:
        load_pretrained(encoder, about)
    if start.init_from is not None:
        path = Path(start.init_from)
        load_encoder(encoder, about, open_encoder(path), path)


def train(run: Run) -> None:
    """Train a run to its end, evaluate it in between, and write what it found."""
    options, trainer, folder, data = run.options, run.trainer, run.folder, run.data
    ranks, evaluating = trainer.ranks, options.evaluation
    with (
        explain_full_disk(folder),
        out_of_memory_names(**sizes(options)),
        Requests(folder, ranks) as requests,
        report_of(run) as report,
    ):

        def save(*, best: bool = False) -> None:
            if run.state is None:
                return  # asked to leave during the first evaluation: there is nothing to lose
            # The records first: a checkpoint answers for every row up to its step.
            report.sync(run.state)
            write_checkpoint(folder, options, data, run.state, trainer, best=best)

        evaluator = Evaluator(
            trainer,
            data,
            evaluating,
            workers=options.batches.workers,
            before_batch=partial(requests.check, save),
        )
        if ranks.is_rank_0:
            replace_text(folder / "config.yaml", to_yaml(options))
        if run.state is None:
            run.state = evaluator.baselines()
            report.accuracy(run.state)
        state = run.state
        report.say(describe(folder, data, trainer.device, state))

        while state.epoch < run.num_epochs:
            # Begun in its middle where the run stopped; perhaps its evaluation alone is left.
            run.order.begin(state.epoch, state.step - state.epoch * len(run.order))
            trainer.model.train()
            evaluator.weights_move()
            with report.clock("training"):
                for images, labels in islice(run.batches, run.total_steps - state.step):
                    loss = trainer.step(images, labels, state.step)
                    state.step += 1
                    report.step(state, trainer.learning_rate, loss, trainer.gradient_norm)
                    if is_due(state.step, options.checkpoints.save_every):
                        save()
                    requests.check(save, step=state.step)
                    trainer.clock.mark("records")
            # The epoch counts once it is evaluated: a run that is stopped before evaluates it then.
            is_last = state.epoch + 1 == run.num_epochs
            evaluated = is_last or is_due(state.epoch + 1, evaluating.knn_every)
            if evaluated:
                with report.clock("evaluation"):
                    evaluator.measure(state)
            state.epoch += 1
            best = data.validation is not None and evaluated and state.accuracy > state.best
            if best:
                state.best = state.accuracy
            report.end_epoch(state, evaluated=evaluated)
            save(best=best)

        report.end_training()
        tested = evaluator.at_the_end(num_drawn=MAX_POINTS)
        if ranks.is_rank_0:
            if options.logging.pictures:
                draw(folder, data, state, tested, options.logging)
            write_encoder(folder, trainer.measured.encoder, options.network, data)
            write_results(folder, data, state, tested, trainer.method.figures())
            say_what_is_next(folder, options.data.dataset)


def report_of(run: Run) -> Report:
    """The records of a run, from where it stands."""
    trainer, state = run.trainer, run.state
    return Report(
        run.folder if trainer.ranks.is_rank_0 else None,
        state,
        run.options,
        total_steps=run.total_steps,
        divergence=DivergenceCheck(
            trainer.method.collapsed_loss,
            scale=trainer.method.scale,
            skips=run.options.step.precision == "fp16",
            num_skipped=0 if state is None else state.skipped,
        ),
        phases=trainer.clock,
    )


def sizes(options: PretrainOptions) -> dict[str, object]:
    """The options that decide how much memory a step takes."""
    names = ("batch_size", "num_views", "image_size", "model", "width", "grad_cache_chunk")
    return {name: options.flat()[name] for name in names}


def is_due(count: int, every: int) -> bool:
    """Whether something done `every` so many steps or epochs (0: never) is due after `count`."""
    return every > 0 and count % every == 0


if __name__ == "__main__":
    run_script(main, if_interrupted="(--resume auto continues from the last checkpoint)")
