"""The options of linear.py, by room, and what contradicts itself across rooms."""

from dataclasses import dataclass, field, fields, replace

from data.batches import BatchOptions
from data.sources import DataOptions
from linear_stage.convex_fit import ConvexOptions
from run.device import Device
from run.errors import UserError
from run.rules import broken, out_of_range
from run.saved_run import SavedRun


@dataclass
class StageOptions:
    """The linear stage.

    Args:
        checkpoint: last.pt or best.pt of a run of pretrain.py, or the run's folder (its last.pt).
        weight_decay: L2 penalty of the linear layer.
        device: auto takes cuda, then mps, then cpu.
    """

    checkpoint: str
    weight_decay: float = 1e-4
    device: Device = "auto"

    def mistakes(self) -> list[str]:
        """What is out of range, one sentence each."""
        return out_of_range(self, at_least={"weight_decay": 0})


@dataclass
class ImageOptions:
    """The images.

    Args:
        dataset: Fit on and measure by this data set, which has the run's classes; as of pretrain.py.
            Default: that of the run, of which nothing is fetched.
        data_root: Default: the one that the run was trained with; with --dataset as of pretrain.py.
        val_fraction: With --dataset, as of pretrain.py.
        val_shards: With --dataset, as of pretrain.py.
        validation_fraction: The share of every class of the training images to hold out and choose by;
            as of pretrain.py. Default: that of the run.
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
        if self.validation_fraction is not None:
            data = replace(data, validation_fraction=self.validation_fraction)
        if mistakes := data.mistakes():
            raise UserError("; ".join(mistakes))
        return data


@dataclass
class LinearOptions:
    """The options of linear.py, by room."""

    stage: StageOptions
    images: ImageOptions = field(default_factory=ImageOptions)
    batches: BatchOptions = field(default_factory=BatchOptions)
    convex: ConvexOptions = field(default_factory=ConvexOptions)

    def mistakes(self) -> list[str]:
        """What is out of range or contradicts itself, one sentence each."""
        rooms = [getattr(self, room.name) for room in fields(self)]
        return [sentence for room in rooms for sentence in room.mistakes()]
