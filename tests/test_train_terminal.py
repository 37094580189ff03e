"""What pretrain.py, linear.py and embed.py print: progress, the commands to run next, docs/start.md."""

import importlib.util
import re
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import train_fixtures  # puts train/ on the path
from run.command_line import run_script
from run.errors import UserError
from run.progress import ProgressBar
from run.saved_run import open_run
from train_fixtures import pretrain, write_images

DOCS = Path(__file__).parent.parent / "docs"
QUICK = ("--batch_size=6", "--max_steps=2", "--knn_every=1")


def commands_in(text: str) -> dict[str, list[str]]:
    """The commands after "next:", each by the script or option that it names first."""
    lines = text.rpartition("next:\n")[2].strip().splitlines()
    found = [shlex.split(line[line.index("python ") :]) for line in lines]
    return {Path(words[1]).name: words[2:] for words in found}


def test_each_script_ends_with_commands_that_run(tmp_path, monkeypatch, capsys):
    write_images(tmp_path / "my photos", {"cat": 8, "dog": 8})
    monkeypatch.chdir(tmp_path)
    dataset = ("--dataset=imagefolder:my photos", "--val_fraction=0.2")
    pretrain(Path("runs"), *dataset, *QUICK, "--name=pets")
    after_training = commands_in(capsys.readouterr().out)
    assert list(after_training) == ["linear.py", "embed.py"]
    import_module("linear").main([*after_training["linear.py"], "--device=cpu"])
    after_linear = commands_in(capsys.readouterr().out)
    assert after_linear["embed.py"] == after_training["embed.py"]
    import_module("embed").main([*after_linear["embed.py"], "--device=cpu"])
    after_embedding = commands_in(capsys.readouterr().out)
    assert after_embedding["export.py"] == after_linear["export.py"]
    exec(after_embedding["-c"][0], {})
    assert capsys.readouterr().out.startswith("[[")


def test_progress_of_a_resumed_run_without_a_terminal(capsys):
    bar = ProgressBar(step=50, total_steps=60, device=torch.device("cpu"))
    bar.show(55, 2, 1.25, 1000.4)
    bar.say("[red] :smile: stays as it is")
    bar.show(60, 2, 1.0, 1000.4)
    bar.close()
    assert capsys.readouterr().out.splitlines() == [
        "[red] :smile: stays as it is",
        "epoch 2  step 60/60  loss 1.0000  1000 images/s  0:00:00 left",
    ]


def shapes(screen: str) -> list[str]:
    """Each kind of line once, whatever its numbers are."""
    lines = re.sub(r"[━╸╺]+ *", "━ ", re.sub(r"\d[\d.:,]*", "0", screen)).splitlines()
    return list(dict.fromkeys(lines))


def test_screens_in_the_guide_are_what_the_scripts_print():
    spec = importlib.util.spec_from_file_location("screens", DOCS / "screens.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (train, shown), *others = module.screens(module.PAGE.read_text())
    tiny = " ".join((*train_fixtures.TINY, "--epochs=2", "--knn_every=1"))
    printed = module.printed_by([f"{train} {tiny}", *(command for command, _ in others)])
    for found, expected in zip(printed, [shown, *(text for _, text in others)]):
        assert shapes(found) == shapes(expected), found


WANDB = """
class Error(Exception):
    pass

class Run:
    def __init__(self):
        self.id, self.step, self.rows, self.finished = "abc", 0, [], False

    def log(self, values, *, step):
        assert step >= self.step
        self.step = step
        self.rows.append((step, sorted(values)))

    def finish(self):
        self.finished = True

calls, run = [], Run()

def init(**arguments):
    if arguments["name"] == "offline":
        raise Error("no API key.\\nLog in first.")
    calls.append(arguments)
    if arguments["id"]:
        run.step += 1  # the first that it does not have yet
    return run
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A module in the place of Weights & Biases, which keeps what it is given."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    yield import_module("wandb")
    del sys.modules["wandb"]


def test_weights_and_biases_gets_every_step_once(tmp_path, wandb, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # to import it would fail
    options = ("--batch_size=256", "--log=csv,wandb", "--save_every=1")
    run = pretrain(tmp_path, *options, "--max_steps=3", "--name=run")
    assert wandb.run.finished and not (run / "tensorboard").exists()
    pretrain(tmp_path, *options, "--max_steps=4", f"--resume={run / 'step-2.pt'}")
    first, second = wandb.calls
    assert (first["id"], second["id"]) == (None, "abc") and second["resume"] == "allow"
    assert first["name"] == "run" and first["config"]["batch_size"] == 256
    step, accuracy = ["gradient_norm", "learning_rate", "loss"], ["knn_accuracy"]
    steps = [
        (0, accuracy),
        (1, step),
        (2, step),
        (3, step),
        (3, accuracy),
        (4, step),
        (4, accuracy),
    ]
    assert wandb.run.rows == steps


def test_without_csv_there_is_no_table_and_no_curve(tmp_path):
    run = pretrain(tmp_path, *QUICK, "--log=tensorboard")
    assert list((run / "tensorboard").iterdir())
    assert not {"metrics.csv", "timings.csv", "curves.png"} & {path.name for path in run.iterdir()}


def test_pictures_are_not_drawn_where_they_are_not_wanted(tmp_path):
    run = pretrain(tmp_path, *QUICK, "--log=csv", "--no_pictures")
    assert (run / "metrics.csv").is_file() and not list(run.glob("*.png"))


def test_unknown_logger_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        pretrain(tmp_path, "--log=csv,tensorbord")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert "--log csv,tensorbord: accepted are csv, tensorboard, wandb, separated" in error


def test_package_of_a_logger_is_needed_to_train_and_not_to_open_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.draw", lambda *arguments: None)
    run = pretrain(tmp_path, *QUICK, "--name=run")
    monkeypatch.setattr("run.loggers.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^--log tensorboard: run `pip install tensorboard` first"):
        pretrain(tmp_path, *QUICK, "--name=other")
    assert not (tmp_path / "other").exists()
    assert "tensorboard" in open_run(run).options.logging.log
    pretrain(tmp_path, *QUICK, "--log=csv", "--resume", run)


def test_refused_login_is_one_line(tmp_path, wandb, capsys):
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: pretrain(tmp_path, *QUICK, "--log=wandb", "--name=offline"))
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: --log wandb: no API key. Log in first.\n"
