"""Which folder of benchmarks/ may import which, so that no two of them need each other."""

from __future__ import annotations

import ast
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1]
FOLDERS = ("measuring", "reporting", "codegen", "gpu")
"""Each imports only those before it, and no command."""


def test_a_folder_imports_only_those_before_it() -> None:
    commands = {path.stem for path in BENCHMARKS.glob("*.py")}
    found = {path.parent.name for path in BENCHMARKS.glob("*/__init__.py")}
    assert found == set(FOLDERS) and "roofline" in commands
    for k, folder in enumerate(FOLDERS):
        forbidden = commands.union(FOLDERS[k + 1 :])
        for path in (BENCHMARKS / folder).glob("*.py"):
            assert not forbidden & _imported(path.read_text()), path


def _imported(code: str) -> set[str]:
    """The first names of all that is imported anywhere in it."""
    nodes = list(ast.walk(ast.parse(code)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {name.split(".")[0] for name in names}
