"""Settings of the whole suite."""

import pytest
import torch

# The tensors are small: a team of threads costs more than it brings.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that it does not run alone at the end."""
    items.sort(key=lambda item: item.name != "test_every_case_under_the_interpreter")
