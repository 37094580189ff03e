"""docs/training.md and evaluation.md: each command and program runs, in order, on small images."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from train_fixtures import TRAIN, write_images

DOCS = Path(__file__).parent.parent / "docs"
SHORT = ["--batch_size", "6", "--max_steps", "2", "--device", "cpu"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the commands are given, and find what they name: train/ and folders of images."""
    (tmp_path / "train").symlink_to(TRAIN)
    write_images(tmp_path / "photos", {"cat": 14, "dog": 14, "owl": 14})
    write_images(tmp_path / "others", {"jay": 8, "wren": 8})
    monkeypatch.setattr("evaluation.corruptions.CORRUPTIONS", ("fog", "pixelate"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str) -> None:
    """Run a script of train/ in this process, with the options that the command gives it."""
    words = shlex.split(command)
    at = next(k for k, word in enumerate(words) if word.startswith("train/"))
    assert words[0] in ("python", "torchrun") and Path(words[at]).is_file()
    name = Path(words[at]).stem
    trains = name == "pretrain" or "paper" in words
    import_module(name).main([*words[at + 1 :], *(SHORT if trains else [])])


@pytest.mark.parametrize(
    ("page", "scripts"),
    [
        ("training.md", {"pretrain", "linear", "embed"}),
        ("evaluation.md", {"pretrain", "linear", "evaluate"}),
    ],
)
def test_every_command_and_program(folder, page, scripts):
    text, seen = (DOCS / page).read_text(), set()
    for language, block in re.findall(
        r"^```(bash|python)\n(.*?)^```", text, re.DOTALL | re.MULTILINE
    ):
        if language == "python":
            exec(compile(block, f"docs/{page}", "exec"), {})
            continue
        for command in block.strip().splitlines():
            run(command)
            seen.add(re.search(r"train/(\w+)\.py", command)[1])
    assert seen == scripts
    runs = {path.name for path in Path("runs").iterdir() if path.is_dir()}
    assert runs == set(re.findall(r"--name (\w+)", text))
    for name in runs:
        assert (Path("runs") / name / "results.json").is_file()
        assert ("evaluate" in scripts) == (Path("runs") / name / "evaluation.png").is_file()
