"""Exact resuming: what a checkpoint of a run holds, and what puts a trainer back to where it was.

What would change the steps already made is refused, in one line.
"""

import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.images import ImageData
from run.checkpoint import RunState, restored_from, save_checkpoint
from run.errors import UserError
from run.options import PretrainOptions
from run.saved_run import SavedRun, open_newest
from run.seeds import random_state, set_random_state
from training.schedule import build_schedule
from training.trainer import Trainer

# A run may be moved, renamed, become longer or shorter, or be evaluated and saved at other steps; every
# other option has shaped the steps that it has made.
FREE_OPTIONS = {
    "data_root", "epochs", "max_steps", "workers", "device", "timeout_minutes", "knn_every",
    "save_every", "keep", "log", "pictures", "output_dir", "name", "resume",
}  # fmt: skip
# Where images are, which may have moved.
PLACES = {"dataset", "val_shards"}


def write_checkpoint(
    folder: Path,
    options: PretrainOptions,
    data: ImageData,
    state: RunState,
    trainer: Trainer,
    *,
    best: bool,
) -> None:
    """Save all that `resume` and the scripts after training need, on rank 0."""
    random_states = trainer.ranks.all_gather(random_state(trainer.device))
    if not trainer.ranks.is_rank_0:
        return
    save_checkpoint(
        folder,
        state,
        keep=options.checkpoints.keep,
        best=best,
        config=options.flat(),
        machine=describe_machine(trainer.device, trainer.ranks.world_size),
        random_states=random_states,
        data=describe_images(data, trainer),
        **trainer.state_dict(),
    )


def resume(
    trainer: Trainer,
    checkpoints: list[Path],
    options: PretrainOptions,
    data: ImageData,
    *,
    steps_per_epoch: int,
) -> tuple[RunState, PretrainOptions]:
    """Put a trainer where the newest whole checkpoint of its run was written.

    Returns:
        The state of the run, and its options, which may say that it is longer or shorter than it was.
    """
    total_steps = options.schedule.total_steps(steps_per_epoch)

    def restore(saved: SavedRun) -> None:
        ours = with_its_warmup(options, saved.options)
        check_same_run(saved, ours, describe_machine(trainer.device, trainer.ranks.world_size))
        check_same_images(saved, describe_images(data, trainer))
        with restored_from(saved.path):
            _check_progress(saved, steps_per_epoch)
            _restore(trainer, saved)
        if saved.state.step > total_steps:
            raise UserError(
                f"cannot resume {saved.path}: it has made {saved.state.step} steps, and --epochs "
                f"{options.schedule.epochs}, --max_steps {options.schedule.max_steps} end after "
                f"{total_steps}"
            )
        if mistakes := ours.mistakes():
            raise UserError(f"cannot resume {saved.path}: {'; '.join(mistakes)}")

    # The others resume from what rank 0 found to be whole.
    saved = trainer.ranks.from_rank_0(partial(open_newest, checkpoints, restore))
    if not trainer.ranks.is_rank_0:
        _restore(trainer, saved)
    machine = describe_machine(trainer.device, trainer.ranks.world_size)
    if changed := other_machine(saved.content["machine"], machine):
        print(f"warning: {changed}", file=sys.stderr)
    options, state = with_its_warmup(options, saved.options), saved.state
    trainer.schedule = build_schedule(
        options.schedule, trainer.optimizer, steps_per_epoch=steps_per_epoch
    )
    before = saved.options.schedule.total_steps(steps_per_epoch)
    if total_steps != before:
        print(
            f"warning: the run now ends after step {total_steps}, not {before} as before "
            f"(--config {saved.path.parent / 'config.yaml'} repeats its options)",
            file=sys.stderr,
        )
        # An epoch that was cut short, or is now the last, is not over: it is evaluated at its end.
        last_epoch = math.ceil(total_steps / steps_per_epoch) - 1
        state.epoch = min(state.epoch, state.step // steps_per_epoch, last_epoch)
    return state, options


def _restore(trainer: Trainer, saved: SavedRun) -> None:
    """Give a trainer, and the generators of random numbers, the state in a checkpoint."""
    trainer.load_state_dict(saved.content)
    # One for each process.
    states = saved.content.get("random_states") or [saved.content["random_state"]]
    set_random_state(states[trainer.ranks.rank], trainer.device)


def _check_progress(saved: SavedRun, steps_per_epoch: int) -> None:
    state, last = saved.state, saved.options.schedule.total_steps(steps_per_epoch)
    begin, end = (min(epoch * steps_per_epoch, last) for epoch in (state.epoch, state.epoch + 1))
    if not begin <= state.step <= end:
        raise ValueError(f"its step {state.step} is not in its epoch {state.epoch}")


def with_its_warmup(options: PretrainOptions, saved: PretrainOptions) -> PretrainOptions:
    """The options with the warm-up of the run that is resumed, unless they ask for another."""
    if options.schedule.warmup != options.schedule.default_warmup_epochs:
        return options
    return options.changed(warmup_epochs=saved.schedule.warmup)


def describe_images(data: ImageData, trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint says of the images that it was trained on."""
    return {
        "classes": data.classes,
        "num_images": len(data.train),
        "channels": data.channels,
        "stored_size": data.train.stored_size,
        "mean": data.mean,
        "std": data.std,
        "views": [*trainer.views.traits, *trainer.method.traits],
        "order": data.train.order,
    }


def describe_machine(device: torch.device, world_size: int) -> dict[str, Any]:
    """What, besides the options, the last bits of a run depend on."""
    return {
        "world_size": world_size,
        # A sum on the CPU is divided among its threads.
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": str(torch.__version__),
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
    }


def other_machine(then: dict[str, Any], now: dict[str, Any]) -> str | None:
    """In which hardware and versions a run that goes on differs from before, if in any."""
    changed = [
        f"{part} is {now[part]}, was {then[part]}"
        for part in ("gpu", "torch", "cudnn")
        if part in then and then[part] != now[part]  # an older checkpoint does not say
    ]
    if not changed:
        return None
    return (
        f"resumed on other hardware or versions, so the last bits may differ: {'; '.join(changed)}"
    )


def check_same_run(saved: SavedRun, options: PretrainOptions, machine: dict[str, Any]) -> None:
    """Refuse to resume with other options, processes or threads than the run was trained."""
    path, ours, theirs = saved.path, options.flat(), saved.options.flat()
    changed = [
        f"--{option} is {ours[option]}, was {theirs[option]}"
        for option in ours
        if option not in FREE_OPTIONS and ours[option] != theirs[option]
        if option not in PLACES or _kind_of(ours[option]) != _kind_of(theirs[option])
    ]
    if changed:
        raise UserError(
            f"cannot resume {path} with other options: {'; '.join(changed)} "
            f"(--config {path.parent / 'config.yaml'} repeats them)"
        )
    for name, kind, remedy in (
        ("world_size", "processes", "torchrun, {} processes in all,"),
        ("threads", "CPU threads", "OMP_NUM_THREADS={}"),
    ):
        now, then = machine[name], saved.content["machine"].get(name)
        # Either is None where the run moved from or to another kind of device.
        if now is not None and then is not None and now != then:
            raise UserError(
                f"cannot resume {path} with {now} {kind}, it was trained with {then}: sums in another "
                f"order round differently, so the result would differ from that of a run without a stop "
                f"({remedy.format(then)} can resume it)"
            )


def _kind_of(place: str | None) -> str | None:
    """Of a data set in files what remains where it moves."""
    kind, colon, _ = (place or "").partition(":")
    return kind if colon and kind in ("imagefolder", "webdataset") else place


def check_same_images(saved: SavedRun, images: dict[str, Any]) -> None:
    """Refuse to resume with other images than the run was trained on."""
    path, theirs = saved.path, saved.about_images
    # An older checkpoint says nothing of its views: they had none of these traits.
    if traits := sorted(set(images["views"]) ^ set(theirs.get("views") or [])):
        raise UserError(
            f"cannot resume {path}: this version makes other random views "
            f"({', '.join(traits)}); --init_from {path} starts a new run from its encoder"
        )
    changed = [name for name in images if theirs.get(name, images[name]) != images[name]]
    if changed:
        raise UserError(
            f"cannot resume {path}: the images are not those that it was trained on (another "
            f"{', '.join(changed)}); --init_from {path} starts a new run from its encoder"
        )
