"""The options of linear.py, by room, and what contradicts itself across rooms."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from data.batches import BatchOptions
from data.sources import DataOptions
from linear_stage.convex_fit import WEIGHT_DECAY, ConvexOptions
from linear_stage.paper_protocol import PaperOptions, as_list
from run.device import Device
from run.errors import UserError
from run.rules import broken, out_of_range
from run.saved_run import SavedRun
from training.schedule import ScheduleOptions

# What a run draws of its training images, once those of validation_fraction are held out.
DRAWN_PARTS = ("train_images", "label_noise", "imbalance")


@dataclass
class StageOptions:
    """The linear stage.

    Args:
        checkpoint: last.pt or best.pt of a run of pretrain.py, or the run's folder (its last.pt).
        protocol: convex: fit a classifier to the embeddings of plain images by L-BFGS; quick. paper:
            train a classifier on random views, with an optimizer and a schedule. The options of
            published runs are in train/recipes/linear.
        weight_decay: L2 penalty of the linear layer; with --protocol paper, of all that is trained.
            paper also takes several, such as [0,1e-6]: the validation images choose. Default: 1e-4;
            paper: 0.
        device: auto: cuda, then mps, then cpu.
    """

    checkpoint: str
    protocol: Literal["convex", "paper"] = "convex"
    weight_decay: float | list[float] | None = None
    device: Device = "auto"

    def mistakes(self) -> list[str]:
        """What is out of range or contradicts itself, one sentence each."""
        rules = [
            (
                bool(self.weight_decays) and min(self.weight_decays) >= 0,
                f"--weight_decay {self.weight_decay}: must be at least 0",
            ),
            (
                self.protocol == "paper" or len(self.weight_decays) <= 1,
                f"--weight_decay {self.weight_decay}: several need --protocol paper",
            ),
        ]
        return broken(rules)

    @property
    def weight_decays(self) -> list[float]:
        """Those to choose from."""
        if self.weight_decay is None:
            return [0.0 if self.protocol == "paper" else WEIGHT_DECAY]
        return as_list(self.weight_decay)


@dataclass
class ImageOptions:
    """The images.

    Args:
        dataset: The data set to fit and test on, as in pretrain.py. It needs the run's classes.
            Default: that of the run, which is not downloaded.
        data_root: Default: that of the run; with --dataset as in pretrain.py.
        val_fraction: With --dataset, as in pretrain.py.
        val_shards: With --dataset, as in pretrain.py.
        validation_fraction: The share of every class of the training images to hold out for choosing,
            as in pretrain.py. Default: that of the run.
    """

    dataset: str | None = None
    data_root: str | None = None
    val_fraction: float | None = None
    val_shards: str | None = None
    validation_fraction: float | None = None

    def mistakes(self) -> list[str]:
        """What is out of range or contradicts itself, one sentence each."""
        named = self.dataset is not None
        rules = [
            (named or self.val_fraction is None, "--val_fraction needs --dataset"),
            (named or self.val_shards is None, "--val_shards needs --dataset"),
        ]
        return broken(rules) + out_of_range(self, between_0_and_1=("validation_fraction",))

    def named_data(self, run: SavedRun) -> DataOptions:
        """The data of a run, or what the command line names where it names any.

        Raises:
            UserError: the options contradict each other.
        """
        data = run.options.data
        if self.dataset is not None:
            # It is named as a whole; how its images are made the network's input is the run's.
            about = run.about_images
            data = replace(
                data,
                dataset=self.dataset,
                data_root=self.data_root,
                val_fraction=self.val_fraction,
                val_shards=self.val_shards,
                in_chans=about["channels"],
                mean=about.get("mean", data.mean),
                std=about.get("std", data.std),
            )
        elif self.data_root is not None:
            data = replace(data, data_root=self.data_root)
        if self.validation_fraction not in (None, data.validation_fraction):
            drawn = [name for name in DRAWN_PARTS if getattr(data, name) is not None]
            if drawn:
                raise UserError(
                    f"--validation_fraction {self.validation_fraction} contradicts the --{drawn[0]} of "
                    "the run, which would draw other training images: give it to pretrain.py"
                )
            data = replace(data, validation_fraction=self.validation_fraction)
        if mistakes := data.mistakes():
            raise UserError("; ".join(mistakes))
        return data


@dataclass
class LinearOptions:
    """The options of linear.py, by room."""

    stage: StageOptions
    images: ImageOptions = field(default_factory=ImageOptions)
    convex: ConvexOptions = field(default_factory=ConvexOptions)
    paper: PaperOptions = field(default_factory=PaperOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    batches: BatchOptions = field(default_factory=BatchOptions)

    def mistakes(self) -> list[str]:
        """What is out of range or contradicts itself, one sentence each."""
        rooms = [getattr(self, room.name) for room in fields(self)]
        return [sentence for room in rooms for sentence in room.mistakes()] + self._contradictions()

    def _contradictions(self) -> list[str]:
        """Between rooms."""
        is_paper = self.stage.protocol == "paper"
        idle = [self.convex] if is_paper else [self.paper, self.schedule, self.batches]
        rates = self.paper.learning_rates + [self.paper.encoder_rate] * self.paper.finetune
        lowest = min(rates, default=0.0)
        rules = [
            (
                0 <= self.schedule.final_learning_rate <= max(lowest, 0),
                f"--final_learning_rate {self.schedule.final_learning_rate}: must be at least 0 and at "
                f"most the lowest learning rate, {lowest}",
            )
        ]
        return broken(rules) + [
            f"--{name} contradicts --protocol {self.stage.protocol}"
            for room in idle
            for name in _changed(room)
            if name != "workers"
        ]


def _changed(room: Any) -> Iterator[str]:
    """The options of a room that are not at their default."""
    default = type(room)()
    for option in fields(room):
        if getattr(room, option.name) != getattr(default, option.name):
            yield option.name
