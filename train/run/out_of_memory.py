"""Running out of memory, told in one line that names the options behind it."""

from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten

from run.errors import UserError

# How torch says so for the CPU, CUDA and MPS, and of tensors that no address reaches.
SIGNS = (
    "can't allocate memory",
    "out of memory",
    "not enough memory",
    "Invalid buffer size",
    "Storage size calculation overflowed",
    "integer multiplication overflow",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python raised it for want of memory, on any device."""
    if isinstance(error, RuntimeError):
        return any(sign in str(error) for sign in SIGNS)
    return isinstance(error, MemoryError)


@contextmanager
def out_of_memory_names(**options: object) -> Iterator[None]:
    """Turn running out of memory into an error that names the options that ask for it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        asked = ", ".join(f"--{key} {value}" for key, value in options.items() if value is not None)
        raise UserError(
            f"out of memory: lower one of {asked} ({shorten(str(error), 200)})"
        ) from error
