"""Where the numbers of a run go, chosen by --log: CSV files, TensorBoard, Weights & Biases.

The packages of TensorBoard and Weights & Biases are imported only when they are chosen.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from run.atomic_write import replace_text
from run.checkpoint import RunState
from run.errors import UserError
from run.rules import broken

LOGGERS = ("csv", "tensorboard", "wandb")
WANDB_PROJECT = "supcon_kernels"


@dataclass
class LogOptions:
    """Logging.

    Args:
        log: One or more of csv, tensorboard and wandb, separated by commas. csv: metrics.csv,
            timings.csv and, at the end, curves.png. tensorboard: event files in tensorboard/.
            wandb: Weights & Biases, after pip install wandb; WANDB_PROJECT names the project.
            torchrun has options that begin with --log, too: write -- before the script there.
        pictures: Draw curves.png, embedding.png and confusion.png at the end.
    """

    log: str = "csv,tensorboard"
    pictures: bool = True

    @property
    def chosen(self) -> set[str]:
        """The names in `log`."""
        return {name.strip() for name in self.log.split(",")}

    def mistakes(self) -> list[str]:
        """What is unknown, one sentence each."""
        rules = [
            (
                self.chosen <= set(LOGGERS),
                f"--log {self.log}: accepted are {', '.join(LOGGERS)}, separated by commas",
            )
        ]
        return broken(rules)

    def check_installed(self) -> None:
        """Refuse a logger whose package is missing. Only a run needs it, not who opens its checkpoint.

        Raises:
            UserError: names the first.
        """
        for name in sorted(self.chosen & {"tensorboard", "wandb"}):
            if find_spec(name) is None:
                raise UserError(f"--log {name}: run `pip install {name}` first")


class Logger(Protocol):
    """Takes numbers by step."""

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of a step."""

    def flush(self) -> None:
        """Write what is buffered."""

    def close(self) -> None:
        """End the log."""


class TensorBoard:
    """Event files in the folder of the run; a resumed run replaces the steps that it makes again."""

    def __init__(self, folder: Path, resumed: RunState | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = 0 if resumed is None else resumed.step + 1
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of a step."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Write what is buffered."""
        self.writer.flush()

    def close(self) -> None:
        """End the log."""
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases. A resumed run continues it, by the id kept in wandb/run_id.

    Raises:
        UserError: no login, or no connection.
    """

    def __init__(self, folder: Path, resumed: RunState | None, config: Mapping[str, Any]) -> None:
        import wandb

        id_file = folder / "wandb" / "run_id"
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", WANDB_PROJECT),
                name=folder.name,
                dir=str(folder),
                id=id_file.read_text() if resumed is not None and id_file.is_file() else None,
                resume="allow",
                config=dict(config),
                allow_val_change=True,
            )
        except wandb.Error as error:
            raise UserError(f"--log wandb: {' '.join(str(error).split())}") from error
        id_file.parent.mkdir(exist_ok=True)
        replace_text(id_file, self.run.id)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of a step, unless it has later ones: a resumed run repeats equal steps."""
        if step >= self.run.step:
            self.run.log(dict(values), step=step)

    def flush(self) -> None:
        """It sends by itself."""

    def close(self) -> None:
        """End the log."""
        self.run.finish()


def open_loggers(
    options: LogOptions, folder: Path, resumed: RunState | None, config: Mapping[str, Any]
) -> list[Logger]:
    """Those that `options` choose besides csv; `config` is shown beside the numbers."""
    loggers: list[Logger] = []
    if "tensorboard" in options.chosen:
        loggers.append(TensorBoard(folder, resumed))
    if "wandb" in options.chosen:
        loggers.append(WeightsAndBiases(folder, resumed, config))
    return loggers
