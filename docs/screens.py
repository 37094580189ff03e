"""The screens in docs/start.md: `python docs/screens.py` runs their commands and writes what they print.

Each command runs in a terminal of its own, in an empty folder that holds a copy of train/.
"""

import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs" / "start.md"
COLUMNS = 100
# A command in one block of code, what it prints in the next.
SCREEN = re.compile(
    r"(?P<begin>```bash\n(?P<command>[^\n]+)\n```\n\n<!-- screen:begin -->\n)"
    r"```text\n(?P<printed>.*?)\n```\n(?P<end><!-- screen:end -->)",
    re.DOTALL,
)
CONTROL = re.compile(r"\x1b\[[?0-9;]*[A-Za-z]")


def screens(page: str) -> list[tuple[str, str]]:
    """Each command of a page, and what it is said to print."""
    return [(match["command"], match["printed"]) for match in SCREEN.finditer(page)]


def printed_by(commands: Sequence[str]) -> list[str]:
    """What is left on the screen after each of some commands, run one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / "train", Path(folder, "train"), ignore=ignored)
        return [_left_on_screen(_run(command, folder)) for command in commands]


def _run(command: str, folder: str) -> str:
    terminal, end = pty.openpty()
    environment = {
        **os.environ, "COLUMNS": str(COLUMNS), "TERM": "xterm", "PYTHONPATH": str(REPOSITORY)
    }  # fmt: skip
    words = [sys.executable, *shlex.split(command)[1:]]
    with subprocess.Popen(words, cwd=folder, env=environment, stdout=end, stderr=end) as process:
        os.close(end)
        printed = b""
        while piece := _read(terminal):
            printed += piece
    os.close(terminal)
    if process.returncode != 0:
        raise RuntimeError(f"{command} failed:\n{printed.decode()}")
    return printed.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # how Linux says that nobody writes any more
        return b""


def _left_on_screen(printed: str) -> str:
    """Of each line what was written last: a progress bar overwrites itself."""
    lines = (CONTROL.sub("", line).rstrip("\r").split("\r")[-1] for line in printed.split("\n"))
    return "\n".join(line.rstrip() for line in lines).strip()


def main() -> None:
    """Run every command of the page, and write what it prints there."""
    page = PAGE.read_text()
    printed = iter(printed_by([command for command, _ in screens(page)]))
    PAGE.write_text(
        SCREEN.sub(
            lambda found: f"{found['begin']}```text\n{next(printed)}\n```\n{found['end']}", page
        )
    )


if __name__ == "__main__":
    main()
