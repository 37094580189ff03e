"""What a script says last: the commands to run next, ready to be copied."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

SCRIPTS = Path(__file__).parent.parent
FOLDER = "FOLDER"  # of images, which the user has to name


def lines(*commands: tuple[str, str]) -> str:
    """What each command does, and the command: the last lines of a script."""
    width = max(len(what) for what, _ in commands)
    return "\n".join(["next:", *(f"  {what:{width}}  {command}" for what, command in commands)])


def resume(folder: Path) -> str:
    """The options that continue the run in a folder, with all that it was started with."""
    return shlex.join(["--config", str(folder / "config.yaml"), "--resume", str(folder)])


def linear(checkpoint: Path) -> tuple[str, str]:
    """Run linear.py on a checkpoint."""
    return "linear classifier", _python("linear.py", "--checkpoint", checkpoint)


def embed(checkpoint: Path, dataset: str) -> tuple[str, str]:
    """Run embed.py on the images of a data set that is a folder, else on one to be named."""
    kind, _, place = dataset.partition(":")
    images = Path(place) if kind == "imagefolder" else Path(FOLDER)
    if (images / "val").is_dir():
        images = images / "val"
    options = ("--checkpoint", checkpoint, "--images", images, "--output", "embeddings.npz")
    return "embeddings", _python("embed.py", *options)


def export(checkpoint: Path) -> tuple[str, str]:
    """Run export.py on a checkpoint."""
    options = ("--checkpoint", checkpoint, "--output", "encoder.onnx")
    return "ONNX", _python("export.py", *options)


def read(embeddings: Path) -> tuple[str, str]:
    """Read what embed.py has written."""
    program = f'import numpy; print(numpy.load({json.dumps(str(embeddings))})["embeddings"])'
    return "read them", shlex.join(["python", "-c", program])


def _python(script: str, *options: str | Path) -> str:
    path = SCRIPTS / script
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    words: Sequence[str] = ["python", str(path), *map(str, options)]
    return shlex.join(words)
