"""Hooks of mkdocs: what the scripts print, and pictures that lie beside the rows they show."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).parent.parent
PICTURES = "benchmarks/results"


def on_files(files: Files, *, config: Any) -> Files:
    """Add the committed pictures, which are outside docs/."""
    for path in sorted((REPOSITORY / PICTURES).glob("*.png")):
        files.append(File.generated(config, f"{PICTURES}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point to the pictures as the site has them, and put in what each script's --help prints."""
    markdown = markdown.replace(f"](../{PICTURES}/", f"]({PICTURES}/")
    return re.sub(r"<!-- help: (.*?) -->", _help_of, markdown)


def _help_of(match: re.Match[str]) -> str:
    scripts = match[1].split()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        printed = pool.map(_printed_help, scripts)
    return "\n\n".join(
        f"## {script}\n\n```text\n{text}\n```" for script, text in zip(scripts, printed)
    )


def _printed_help(script: str) -> str:
    command = [sys.executable, script, "--help"]
    printed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return re.sub(".\b", "", printed.stdout.strip())  # --print_config, with a backspace
