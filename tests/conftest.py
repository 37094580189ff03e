"""Settings of the whole suite."""

import functools
import importlib.util
import inspect
import os

import pytest
import torch

# The tensors are small: a team of threads costs more than it brings.
torch.set_num_threads(1)


def pytest_configure() -> None:
    """Let Triton's interpreter find the built-in functions of a module once: it does so in each call."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @functools.cache
    def builtins_of(module):
        return [name for name, member in inspect.getmembers(module) if is_builtin(member)]

    def patch_builtins(module, *where):
        for name in builtins_of(module):
            member = getattr(module, name)
            if is_builtin(member):  # not patched by a caller
                interpreter._patch_attr(module, name, member, *where)

    interpreter._patch_builtin = patch_builtins


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that it does not run alone at the end."""
    items.sort(key=lambda item: item.name != "test_every_case_under_the_interpreter")
