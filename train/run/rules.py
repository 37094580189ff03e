"""Rules of options: each broken one is a sentence that names the option and what is accepted."""

from collections.abc import Iterable, Mapping
from typing import Any

# Beyond it no step fits in memory.
LARGEST = 2**31 - 1


def broken(rules: Iterable[tuple[bool, str]]) -> list[str]:
    """The sentences of the rules that do not hold."""
    return [sentence for holds, sentence in rules if not holds]


def out_of_range(
    options: object,
    *,
    at_least: Mapping[str, int] | None = None,
    at_most: Mapping[str, int] | None = None,
    greater_than_0: Iterable[str] = (),
    between_0_and_1: Iterable[str] = (),
) -> list[str]:
    """Of some options by name, None aside, those outside of their bounds."""

    def said(name: str, accepted: str) -> str:
        return f"--{name} {getattr(options, name)}: must {accepted}"

    def value(name: str) -> Any:
        return getattr(options, name)

    checks = [
        *((name, value(name) is None or value(name) <= most, f"be at most {most}")
          for name, most in (at_most or {}).items()),
        *((name, value(name) is None or value(name) >= least, f"be at least {least}")
          for name, least in (at_least or {}).items()),
        *((name, value(name) is None or value(name) > 0, "be greater than 0")
          for name in greater_than_0),
        *((name, value(name) is None or 0 < value(name) < 1, "lie between 0 and 1")
          for name in between_0_and_1),
    ]  # fmt: skip
    return [said(name, accepted) for name, holds, accepted in checks if not holds]
