"""README and docs/: the commands of the training driver run as they stand, on folders of small images.

A shell reads them, with a log in the place of every program; then each script runs in this process.
"""

import os
import re
import shlex
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

from test_train_convert import write_theirs
from train_fixtures import TRAIN, write_images

ROOT = Path(__file__).parent.parent
# What a reader follows in one go: commands take what others have made.
READINGS = (
    ["README"],
    ["docs/start"],
    ["docs/training", "docs/export", "docs/evaluation", "docs/clusters"],
    ["docs/results"],
    ["docs/migration"],
    ["docs/paper"],
)
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SLURM = {"JOB_ID": "7", "JOB_NODELIST": "host-[1-4]", "PROCID": "0", "LOCALID": "0", "NTASKS": "1"}
SLURM |= {"NTASKS_PER_NODE": "1"}
PROGRAMS = ("python", "torchrun", "pip", "git", "pytest", "mkdocs")
NOT_RUN = ("train/export.py",)  # it needs onnx, as integrations/test_onnx.py has it
SHORT = ["--batch_size", "6", "--max_steps", "2", "--device", "cpu"]
PHOTOS = ["--dataset", "imagefolder:photos", "--val_fraction", "0.1", "--image_size", "16"]


@pytest.fixture
def folder(tmp_path):
    """Where the commands find what they name: train/, folders of images, a checkpoint, a configuration."""
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "train").symlink_to(TRAIN)
    (folder / "supcon_kernels").mkdir()
    write_images(folder / "photos", {"cat": 14, "dog": 14, "owl": 14})
    write_images(folder / "others", {"jay": 8, "wren": 8})
    write_theirs(folder / "ckpt_epoch_1000.pth", bottleneck=True, width=64)
    (folder / "my.yaml").write_text("dataset: imagefolder:photos\nval_fraction: 0.1\n")
    return folder


@pytest.fixture
def commands_of(tmp_path, folder):
    """Of a block of shell: the words of each program that it starts, on one process of one host."""
    log, programs = tmp_path / "log", tmp_path / "bin"
    programs.mkdir()
    scripts = {name: f'printf "%q " {name} "$@" >> {log}; echo >> {log}' for name in PROGRAMS}
    scripts |= {"srun": 'exec "$@"', "scontrol": "echo host-1"}
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/bash\n{script}\n")
        (programs / name).chmod(0o755)

    def run(block: str) -> list[list[str]]:
        log.write_text("")
        environment = os.environ | {f"SLURM_{name}": value for name, value in SLURM.items()}
        environment["PATH"] = f"{programs}:{environment['PATH']}"
        subprocess.run(["bash", "-euc", block], cwd=folder, env=environment, check=True)
        return [shlex.split(line) for line in log.read_text().splitlines()]

    return run


def run(words: list[str]) -> str | None:
    """Run a script of train/ in this process, with the options that the command gives it; its name."""
    script = next((word for word in words if word.startswith("train/")), None)
    if script is None or script in NOT_RUN:
        return None
    assert words[0] in ("python", "torchrun") and Path(script).is_file()
    name = Path(script).stem
    options = words[words.index(script) + 1 :]
    if name == "paper":  # a report without a run, as test_train_paper.py has those with runs
        options += ["--budget", "0min", "--device", "cpu"]
    elif name == "pretrain" or "paper" in options:
        options += SHORT
    if any("fashion" in option for option in options):
        options += [*PHOTOS, "--train_images", "24"]
    import_module(name).main(options)
    return name


@pytest.mark.parametrize("pages", READINGS, ids=lambda pages: Path(pages[0]).stem)
def test_every_command_and_program(pages, folder, commands_of, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("evaluation.corruptions.CORRUPTIONS", ("fog", "pixelate"))
    text = "".join((ROOT / f"{page}.md").read_text() for page in pages)
    if "runs/other" in text:  # of the reader's own
        run(["python", "train/pretrain.py", *PHOTOS, "--name", "other"])
        run(["python", "train/linear.py", "--checkpoint", "runs/other"])
    seen, names = set(), set()
    for language, block in BLOCK.findall(text):
        if language == "bash":
            seen |= {run(words) for words in commands_of(block)}
            names |= set(re.findall(r"--name (\w+)", block))
        elif "docs/training" in pages:  # test_docs.py has those of the other pages
            exec(compile(block, "docs", "exec"), {})
    assert seen & {"pretrain", "paper"}
    assert names or Path("runs/digits-supcon-seed0").is_dir() or Path("runs/paper").is_dir()
    assert all((Path("runs") / name / "results.json").is_file() for name in names)
    assert Path("runs/comparison.md").is_file() == ("evaluate" in seen)
