"""pytorch-metric-learning, an optional dependency, where a method takes its loss from it."""

from importlib import import_module
from typing import Any

from run.errors import UserError


def metric_learning(part: str, *, method: str) -> Any:
    """A module of the library.

    Raises:
        UserError: it is not installed.
    """
    try:
        return import_module(f"pytorch_metric_learning.{part}")
    except ImportError as error:
        raise UserError(
            f"--method {method} needs pytorch-metric-learning: pip install -e '.[metric]'"
        ) from error
