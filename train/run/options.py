"""All options of a run: those of every room, and what contradicts itself across rooms.

On the command line, in config.yaml and in checkpoints they are flat: no two rooms share a name.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from data.batches import BatchOptions
from data.sources import DataOptions
from data.views import ViewOptions
from evaluation.evaluator import EvaluationOptions
from methods.options import WITH_CLASSIFIER, MethodOptions
from network.embedder import NetworkOptions
from network.weights import StartOptions
from run.checkpoint import CheckpointOptions
from run.device import DeviceOptions
from run.folder import FolderOptions
from run.loggers import LogOptions
from run.rules import broken
from run.seeds import SeedOptions
from training.optimizer import OptimizerOptions
from training.schedule import ScheduleOptions
from training.trainer import StepOptions


@dataclass
class PretrainOptions:
    """The options of pretrain.py, by room."""

    data: DataOptions = field(default_factory=DataOptions)
    views: ViewOptions = field(default_factory=ViewOptions)
    batches: BatchOptions = field(default_factory=BatchOptions)
    method: MethodOptions = field(default_factory=MethodOptions)
    network: NetworkOptions = field(default_factory=NetworkOptions)
    start: StartOptions = field(default_factory=StartOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    step: StepOptions = field(default_factory=StepOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    seeds: SeedOptions = field(default_factory=SeedOptions)
    checkpoints: CheckpointOptions = field(default_factory=CheckpointOptions)
    logging: LogOptions = field(default_factory=LogOptions)
    folder: FolderOptions = field(default_factory=FolderOptions)
    device: DeviceOptions = field(default_factory=DeviceOptions)

    def __post_init__(self) -> None:
        if self.views.num_views is None:
            self.views = replace(self.views, num_views=self.method.default_views)

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> "PretrainOptions":
        """Sort options into their rooms; those that are not named have their defaults."""
        rooms = get_type_hints(cls)
        sorted_values: dict[str, dict[str, Any]] = {room: {} for room in rooms}
        room_of = {option.name: room for room in rooms for option in fields(rooms[room])}
        for name, value in values.items():
            sorted_values[room_of[name]][name] = value
        return cls(**{room: rooms[room](**sorted_values[room]) for room in rooms})

    def flat(self) -> dict[str, Any]:
        """Every option by name."""
        return {name: value for room in asdict(self).values() for name, value in room.items()}

    def changed(self, **values: Any) -> "PretrainOptions":
        """The options with some of them changed."""
        return PretrainOptions.from_flat(self.flat() | values)

    @property
    def num_views(self) -> int:
        """Of each image in a batch."""
        assert self.views.num_views is not None
        return self.views.num_views

    @property
    def default_name(self) -> str:
        """The name of a run whose --name was not given, before it is numbered."""
        dataset, _, path = self.data.dataset.partition(":")
        folder = re.sub(r"[^\w.-]+", "_", Path(path).resolve().name) if path else ""
        parts = [dataset, folder, self.method.method, f"seed{self.seeds.seed}"]
        return "-".join(filter(None, parts))

    def mistakes(self) -> list[str]:
        """What is out of range or contradicts itself, one sentence each."""
        rooms = [getattr(self, room.name) for room in fields(self)]
        return [sentence for room in rooms for sentence in room.mistakes()] + self._contradictions()

    def _contradictions(self) -> list[str]:
        """Between rooms."""
        data, views, batches, method = self.data, self.views, self.batches, self.method
        schedule, optimizer, start = self.schedule, self.optimizer, self.start
        num_keys = batches.batch_size * (self.num_views - 1)
        rules = [
            (
                views.crops(data.dataset) or views.min_crop_area == ViewOptions.min_crop_area,
                "--min_crop_area contradicts --augment digits, which does not crop",
            ),
            (
                batches.classes_per_batch is None or method.uses_labels,
                f"--classes_per_batch contradicts --method {method.method}, which trains without "
                "labels",
            ),
            (
                self.num_views >= method.least_views,
                f"--num_views {self.num_views}: must be at least {method.least_views} for --method "
                f"{method.method}",
            ),
            (
                ((method.max_positives or self.num_views - 1) + 1) % self.num_views == 0,
                f"--max_positives {method.max_positives}: must be one less than a multiple of the "
                f"{self.num_views} views of an image",
            ),
            (
                self.step.ema_decay is None or method.method not in WITH_CLASSIFIER,
                f"--ema_decay contradicts --method {method.method}, whose classifier is not averaged",
            ),
            (
                self.step.grad_cache_chunk is None or method.method != "cmc",
                "--grad_cache_chunk contradicts --method cmc, whose second encoder sees the whole "
                "batch at once",
            ),
            (
                method.num_keys is None or method.num_keys >= num_keys,
                f"--queue_size {method.num_keys}: must hold at least the {num_keys} keys of a step, "
                "which are all views but the first of --batch_size images",
            ),
            (
                self.network.stem == "standard" or not start.pretrained,
                "--pretrained contradicts --stem small, which timm has no weights for: "
                "use --stem standard",
            ),
            (
                0 <= schedule.final_learning_rate <= optimizer.learning_rate,
                f"--final_learning_rate {schedule.final_learning_rate}: must be at least 0 and at "
                f"most --learning_rate {optimizer.learning_rate}",
            ),
        ]
        return broken(rules)


def option_types() -> dict[str, Any]:
    """The type of every option by name."""
    rooms = get_type_hints(PretrainOptions).values()
    return {name: kind for room in rooms for name, kind in get_type_hints(room).items()}


def to_yaml(options: PretrainOptions) -> str:
    """Write options such that --config reads them back."""
    return yaml.safe_dump(options.flat(), sort_keys=False)
