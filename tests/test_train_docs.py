"""docs/training.md, export.md and evaluation.md: what they show runs, on folders of small images.

`pip install` aside, and train/export.py, which integrations/test_onnx.py runs: it needs onnx.
"""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from train_fixtures import TRAIN, write_images

DOCS = Path(__file__).parent.parent / "docs"
PAGES = "".join((DOCS / f"{name}.md").read_text() for name in ("training", "export", "evaluation"))
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)
NOT_RUN = ("pip install ", "python train/export.py ")
SHORT = ["--batch_size", "6", "--max_steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands find what they name: train/ and folders of images."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "train").symlink_to(TRAIN)
    write_images(folder / "photos", {"cat": 14, "dog": 14, "owl": 14})
    write_images(folder / "others", {"jay": 8, "wren": 8})
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
    monkeypatch.setattr("evaluation.corruptions.CORRUPTIONS", ("fog", "pixelate"))
    seen = set()
    for language, block in BLOCK.findall(PAGES):
        if language == "python":
            exec(compile(block, "docs", "exec"), {})
            continue
        for command in block.strip().splitlines():
            if command.startswith(NOT_RUN):
                continue
            run(command)
            seen.add(re.search(r"train/(\w+)\.py", command)[1])
    assert seen == {"pretrain", "linear", "embed", "evaluate"}
    runs = {path.name for path in Path("runs").iterdir() if path.is_dir()}
    assert runs == set(re.findall(r"--name (\w+)", PAGES))
    for name in runs:
        assert (Path("runs") / name / "results.json").is_file()
    assert Path("runs/comparison.md").is_file()
