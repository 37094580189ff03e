"""docs/training.md: each of its commands and programs runs, in order, on a folder of small images."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from train_fixtures import TRAIN, write_images

TEXT = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
SHORT = ["--batch_size", "6", "--max_steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands find what they name: train/ and photos/."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "train").symlink_to(TRAIN)
    write_images(folder / "photos", {"cat": 14, "dog": 14, "owl": 14})
    return folder


def run(command: str) -> None:
    """Run a script of train/ in this process, with the options that the command gives it."""
    words = shlex.split(command)
    at = next(k for k, word in enumerate(words) if word.startswith("train/"))
    assert words[0] in ("python", "torchrun") and Path(words[at]).is_file()
    name = Path(words[at]).stem
    trains = name == "pretrain" or "paper" in words
    import_module(name).main([*words[at + 1 :], *(SHORT if trains else [])])


def test_every_command_and_program(folder, monkeypatch):
    monkeypatch.chdir(folder)
    seen = set()
    for language, block in BLOCKS:
        if language == "python":
            exec(compile(block, "docs/training.md", "exec"), {})
            continue
        for command in block.strip().splitlines():
            run(command)
            seen.add(re.search(r"train/(\w+)\.py", command)[1])
    assert seen == {"pretrain", "linear", "embed"}
    runs = {path.name for path in Path("runs").iterdir()}
    assert runs == set(re.findall(r"--name (\w+)", TEXT))
    for name in runs:
        assert (Path("runs") / name / "results.json").is_file()
