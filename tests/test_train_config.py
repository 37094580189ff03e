"""The command line and YAML: who wins, and what is refused."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import fields

import pytest

import train_fixtures
from linear_stage.options import LinearOptions
from run.command_line import parse, run_script
from run.device import pick_device
from run.errors import UserError
from run.options import PretrainOptions, to_yaml
from train_parts import options_of


def read(*argv):
    return parse(PretrainOptions, [str(word) for word in argv], prog="pretrain", description="")


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("batch_size: 64\ntemperature: 0.2\n")
    return path


def test_command_line_wins_wherever_config_stands(recipe):
    before = read("--batch_size", 32, "--config", recipe)
    after = read("--config", recipe, "--batch_size", 32)
    joined = read("--batch_size=32", f"--config={recipe}")
    assert before == after == joined
    assert (before.batches.batch_size, before.method.temperature) == (32, 0.2)
    assert read("--config", recipe).batches.batch_size == 64
    assert read() == options_of()


def test_later_of_two_recipes_wins(recipe, tmp_path):
    second = tmp_path / "second.yaml"
    second.write_text("batch_size: 48\n")
    config = read("--config", recipe, "--config", second)
    assert (config.batches.batch_size, config.method.temperature) == (48, 0.2)


@pytest.mark.parametrize("text", ["", "- epochs: 10\n"])
def test_config_file_without_options(tmp_path, capsys, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(SystemExit):
        read("--config", str(tmp_path / "a.yaml"))
    error = capsys.readouterr().err
    assert error.startswith("error: --config: the file must have a line such as 'epochs: 10'")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch_sise", "3"], "--batch_sise 3 (did you mean --batch_size?)"),
        (["--lr=0.1"], "--lr=0.1 (did you mean --learning_rate?)"),
        (["--zzz", "3"], "--zzz 3 (--help lists all options)"),
        (["--num_views", "1001"], "--num_views 1001: must be at most 1000"),
        (["--width", str(2**64)], f"--width {2**64}: must be at most"),
        (["--batch", "3"], "--batch 3"),
        (["--sync_batchnorm", "--compile"], "--sync_batchnorm contradicts --compile"),
        (["--batch_size", "many"], "batch_size"),
        (["--decay_epochs", "10"], "--decay_epochs 10: a list is accepted, such as [10]"),
        (["--batch_size", "1"], "--batch_size 1: must be at least 2"),
        (["--num_views", "1"], "--num_views 1: must be at least 2 for --method supcon"),
        (["--min_crop_area", "0"], "--min_crop_area 0.0: must be greater than 0 and at most 1"),
        (["--min_crop_area", "0.5"], "--min_crop_area contradicts --augment digits"),
        (["--base_temperature", "0"], "--base_temperature 0.0: must be greater than 0"),
        (["--decay_norm_and_bias", "norm"], "decay_norm_and_bias"),
        (
            ["--final_learning_rate", "1"],
            "--final_learning_rate 1.0: must be at least 0 and at most",
        ),
        (["--classes_per_batch", "1"], "--classes_per_batch 1: must be at least 2, one class"),
        (["--classes_per_batch", "0"], "--classes_per_batch 0: must be at least 2"),
        (
            ["--classes_per_batch", "10"],
            "--batch_size 128 is no multiple of --classes_per_batch 10",
        ),
        (["--classes_per_batch", "8", "--method", "simclr"], "contradicts --method simclr"),
        (["--augment", "mixup"], "augment"),
        (["--precision", "fp8"], "precision"),
        (["--temperature", "0"], "--temperature 0.0: must be greater than 0"),
        (["--temperature", "nan"], "temperature"),
        (["--method", "byol"], "method"),
        (["--device", "tpu"], "device"),
        (["--timeout_minutes", "1e12"], "--timeout_minutes 1000000000000.0: must be at most"),
        (["--dataset", "mnist"], "accepted are digits, fashion_mnist, cifar10, cifar100"),
        (["--dataset", "imagefolder:"], "--dataset imagefolder:: accepted are"),
        (["--dataset", "cifar10:x"], "stl10, imagefolder:PATH, webdataset:URL"),
        (["--dataset", "webdataset:a.tar"], "needs --val_shards URL, or --val_fraction"),
        (
            ["--dataset", "webdataset:a", "--val_shards", "b", "--val_fraction", "0.1"],
            "and not both",
        ),
        (["--dataset", "imagefolder:x", "--val_shards", "b"], "--val_shards contradicts"),
        (["--data_root", "data"], "--data_root contradicts --dataset digits"),
        (["--dataset", "imagefolder:x", "--data_root", "y"], "--data_root contradicts"),
        (["--val_fraction", "0.1"], "--val_fraction contradicts --dataset digits"),
        (["--dataset", "imagefolder:x", "--val_fraction", "1"], "between 0 and 1"),
        (["--validation_fraction", "1"], "--validation_fraction 1.0: must lie between 0 and 1"),
        (["--knn_k", "0"], "--knn_k 0: must be at least 1"),
        (["--knn_temperature", "0"], "--knn_temperature 0.0: must be greater than 0"),
        (["--epochs", "5", "--warmup_epochs", "5"], "--warmup_epochs 5 contradicts --epochs 5"),
        (["--optimizer", "sgd"], "optimizer"),
        (["--rmsprop_eps", "0.1"], "--rmsprop_eps contradicts --optimizer momentum"),
        (["--clip_grad", "0"], "--clip_grad 0.0: must be greater than 0"),
        (["--schedule", "step"], "--schedule step needs --decay_epochs"),
        (["--decay_epochs", "[3]"], "--decay_epochs and --decay_rate contradict --schedule cosine"),
        (["--decay_rate", "0.5"], "--decay_epochs and --decay_rate contradict --schedule cosine"),
        (["--schedule", "exponential", "--decay_epochs", "[1,2]"], "exponential takes one number"),
        (["--schedule", "step", "--decay_epochs", "[9,7]"], "[9.0, 7.0]: must rise"),
        (
            ["--schedule", "step", "--decay_epochs", "[2]", "--warmup_epochs", "4"],
            "must rise, from --warmup_epochs 4 on",
        ),
        (["--probe", "maybe"], "--probe/--no_probe: true or false is accepted, not: 'maybe'"),
        (["--schedule", "step", "--decay_epochs", "[9]", "--decay_rate", "0"], "--decay_rate 0.0"),
        (["--pretrained", "true"], "--pretrained contradicts --stem small"),
        (
            ["--pretrained", "true", "--stem", "standard", "--init_from", "x"],
            "contradicts --init_from",
        ),
        (["--queue_size", "127"], "--queue_size 127: must hold at least the 128 keys of a step"),
        (["--queue_size", "0"], "--queue_size 0: must hold at least the 128 keys of a step"),
        (["--queue_size", "255", "--num_views", "3"], "at least the 256 keys of a step"),
        (
            ["--method", "joint", "--queue_size", "256"],
            "--queue_size contradicts --method joint: it is for supcon, moco",
        ),
        (
            ["--method", "cross_entropy", "--temperature", "0.2"],
            "--temperature contradicts --method cross_entropy: it is for supcon, simclr, moco",
        ),
        (["--label_smoothing", "0.1"], "it is for cross_entropy, joint"),
        (
            ["--method", "joint", "--label_smoothing", "1"],
            "--label_smoothing 1.0: must be at least",
        ),
        (["--method", "max_margin", "--margin", "0.5"], "--margin 0.5: must be an integer"),
        (["--learn_temperature", "--base_temperature", "1"], "contradicts --learn_temperature"),
        (["--method", "moco", "--classes_per_batch", "2"], "--method moco, which trains without"),
        (["--method", "joint", "--ema_decay", "0.9"], "--ema_decay contradicts --method joint"),
        (["--method", "cmc", "--grad_cache_chunk", "9"], "--grad_cache_chunk contradicts --method"),
        (["--label_noise", "1"], "--label_noise 1.0: must lie between 0 and 1"),
        (["--imbalance", "0.5"], "--imbalance 0.5: must be at least 1"),
        (["--train_images", "0"], "--train_images 0: must be at least 1"),
        (["--max_positives", "4"], "--max_positives 4: must be one less than a multiple of the 2"),
        (["--max_positives", "3", "--queue_size", "256"], "contradicts --queue_size"),
        (["--queue_momentum", "0.99"], "contradicts the absence of a queue: give --queue_size"),
        (
            ["--queue_size", "256", "--queue_momentum", "1"],
            "--queue_momentum 1.0: must be at least 0 and less than 1",
        ),
        (["--ema_decay", "1"], "--ema_decay 1.0: must lie between 0 and 1"),
        (["--std", "[0.5,0,1]"], "--std [0.5, 0.0, 1.0]: must be greater than 0"),
        (["--in_chans", "2"], "in_chans"),
        (["--stem", "standard", "--width", "32"], "--width contradicts --stem standard"),
        (["--name", "a/b"], "--name a/b"),
        (["--name", ".."], "--name ..: a folder name"),
        (["--name", "."], "--name .: a folder name"),
        (["--seed", str(2**63)], f"--seed {2**63}: must be less than"),
        (["--name", "a", "--resume", "runs/b/last.pt"], "contradicts --resume runs/b/last.pt"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config"], "--config"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_exit_with_code_2(argv, message, capsys):
    with pytest.raises(SystemExit) as ended:
        read(*argv)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 0), (2, 1), (4, 3), (5, 4), (60, 4), (700, 4)])
def test_default_warmup_ends_before_the_run(tmp_path, epochs, warmup):
    config = read("--epochs", epochs)
    assert config.schedule.warmup_epochs == warmup
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert f"warmup_epochs: {warmup}\n" in path.read_text()
    assert read("--config", path) == config


@pytest.mark.parametrize("option", ["epochs", "learning_rate", "output_dir", "dataset", "probe"])
def test_null_is_refused_where_a_value_is_needed(tmp_path, capsys, option):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"max_steps: null\n{option}: null\n")
    with pytest.raises(SystemExit) as ended:
        read("--config", path)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith(f"error: --{option} null: it needs a value")


def test_unknown_option_in_yaml_exits_with_code_2(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text("batch_sise: 64\n")
    with pytest.raises(SystemExit) as ended:
        read("--config", path)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert "batch_sise" in error and "(did you mean --batch_size?)" in error


def test_every_option_is_in_the_help(capsys):
    with pytest.raises(SystemExit) as ended:
        read("--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for option in options_of().flat():
        described = re.split(rf"\n  --{option}\b", text)[1].split("(")[0]
        assert len(described.split()) > 2, f"--{option} is not described"


def test_help_sorts_options_by_room(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    text = capsys.readouterr().out
    for earlier, title, later in (
        ("--std", "Batches", "--batch_size"),
        ("--grad_cache_chunk", "Measuring the embedding", "--probe, --no_probe"),
    ):
        assert text.index(earlier) < text.index(f"{title}:\n") < text.index(later)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--probe"], True),
        (["--probe", "true"], True),
        (["--probe=false"], False),
        (["--no_probe"], False),
        (["--probe", "--keep", "3"], True),
        ([], True),
    ],
    ids=str,
)
def test_boolean_is_a_flag_or_has_a_value_and_wins_over_yaml(tmp_path, words, expected):
    path = tmp_path / "recipe.yaml"
    path.write_text("probe: true\n")
    assert read("--config", path, *words).evaluation.probe is expected
    assert read(*words).evaluation.probe is (expected and words != [])


@pytest.mark.parametrize(("decay", "warmup"), [("[2]", 2), ("[2.5,4]", 2), ("[9]", 4), ("[0]", 0)])
def test_default_warmup_ends_before_the_first_decay(decay, warmup):
    assert read("--schedule", "step", "--decay_epochs", decay).schedule.warmup == warmup


def test_no_two_rooms_share_an_option():
    rooms = [getattr(PretrainOptions(), room.name) for room in fields(PretrainOptions)]
    names = [option.name for room in rooms for option in fields(room)]
    assert len(names) == len(set(names)) == len(PretrainOptions().flat())


def test_linear_needs_a_checkpoint(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(LinearOptions, [], prog="linear", description="")
    assert ended.value.code == 2 and "checkpoint" in capsys.readouterr().err


def test_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    with pytest.raises(UserError, match="--device cuda"):
        pick_device("cuda")
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert pick_device("auto").type == "mps"


@pytest.mark.parametrize(
    ("hint", "line"), [("", "interrupted\n"), ("(go on so)", "interrupted (go on so)\n")]
)
def test_interrupt_says_what_its_script_has_to_say(capsys, hint, line):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_script(interrupted, if_interrupted=hint)
    assert ended.value.code == 130
    assert capsys.readouterr().err == line


INTERRUPTED_TWICE = """
import os, signal, sys
from run.command_line import run_script

def main():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        # In the midst of what cleans up after the first.
        os.kill(os.getpid(), signal.SIGINT)

run_script(main) if sys.argv[1] == "cleaning" else None
import atexit
atexit.register(os.kill, os.getpid(), signal.SIGINT)
run_script(lambda: os.kill(os.getpid(), signal.SIGINT))
"""


@pytest.mark.parametrize(("when", "said"), [("cleaning", ""), ("leaving", "interrupted\n")])
def test_second_interrupt_ends_without_a_traceback(when, said):
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_TWICE, when],
        env={**os.environ, "PYTHONPATH": str(train_fixtures.TRAIN)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert (ended.returncode, ended.stderr) == (130, said)


def test_interrupt_while_libraries_are_imported_is_one_line():
    script = "import run.quiet_interrupt; raise KeyboardInterrupt"
    path = {**os.environ, "PYTHONPATH": str(train_fixtures.TRAIN)}
    ended = subprocess.run(
        [sys.executable, "-c", script], env=path, stderr=subprocess.PIPE, text=True
    )
    assert (abs(ended.returncode), ended.stderr) == (signal.SIGINT, "interrupted\n")


def test_closed_pipe_ends_without_a_traceback(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as ended:
            run_script(lambda: print("a line"))
    assert ended.value.code == 1
    assert capsys.readouterr().err == ""
