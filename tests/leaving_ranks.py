"""Processes that leave `joined` in several ways, and write which threads of Gloo each way has left.

torchrun starts it for tests/test_train_ranks.py. It imports no more than run/processes.py needs.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

import train_fixtures  # noqa: F401  puts train/ on the path
from run.errors import UserError
from run.processes import Ranks, joined


def end(ranks: Ranks) -> None:
    """Train a step."""
    network = ranks.parallel(nn.Linear(3, 2))
    network(torch.ones(4, 3)).sum().backward()


def fail(ranks: Ranks) -> None:
    """Fail by a mistake of the user."""
    network = ranks.parallel(nn.Linear(3, 2))
    raise UserError(f"no such image for {network}")


def fail_from_another(ranks: Ranks) -> None:
    """Fail by a mistake that another error has shown."""
    try:
        fail(ranks)
    except UserError as error:
        raise UserError("there is an image missing") from error


def threads_after(act) -> list[str]:
    """The threads of Gloo once an act has ended, while its error is still handled."""
    try:
        with joined(torch.device("cpu"), timeout_minutes=1) as ranks:
            act(ranks)
    except (UserError, SystemExit):
        return threads()
    return threads()


def threads() -> list[str]:
    """Those of this process."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


if __name__ == "__main__":
    found = {act.__name__: threads_after(act) for act in (end, fail, fail_from_another)}
    path = Path(sys.argv[1]) / f"left{os.environ['RANK']}.json"
    path.write_text(json.dumps(found))
