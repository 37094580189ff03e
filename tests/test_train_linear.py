"""linear.py and embed.py on a checkpoint that somebody else has written: they run nothing it names."""

import shlex
from functools import partial
from importlib import import_module

import pytest
import torch
from PIL import Image

import train_fixtures  # noqa: F401  puts train/ on the path
from linear import main
from run.command_line import run_script
from train_fixtures import pretrain, write_images, write_shards

OPTIONS = ("--batch_size", 8, "--max_steps", 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one step on shards."""
    folder = tmp_path_factory.mktemp("runs")
    urls = write_shards(folder / "shards", [16])
    return pretrain(folder, "--dataset", f"webdataset:{urls}", "--val_fraction", 0.25, *OPTIONS)


def doctored(run, path, **options):
    """The checkpoint of a run as if it had had other options, written before it kept its input."""
    saved = torch.load(run / "last.pt", weights_only=True)
    saved["config"] |= options
    for key in ("stored_size", "mean", "std"):
        del saved["data"][key]
    torch.save(saved, path)


def error_of(capsys, act):
    with pytest.raises(SystemExit) as ended:
        run_script(act)
    error = capsys.readouterr().err
    assert ended.value.code == 1 and error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize("option", ["dataset", "val_shards"])
@pytest.mark.parametrize("script", ["linear", "embed"])
def test_command_in_a_checkpoint_is_not_run(run, tmp_path, capsys, script, option):
    mark, path = tmp_path / "mark", tmp_path / "evil.pt"
    shard = str(run.parent / "shards/train-0.tar")
    command = f"pipe:touch {shlex.quote(str(mark))}; cat {shlex.quote(shard)}"
    options = {"val_fraction": None, "dataset": f"webdataset:{shard}", "val_shards": shard}
    options[option] = command if option == "val_shards" else f"webdataset:{command}"
    doctored(run, path, data_root=str(tmp_path), **options)
    argv = ["--checkpoint", str(path), "--device=cpu"]
    if script == "embed":
        write_images(tmp_path / "images", {"cat": 1})
        argv += ["--images", str(tmp_path / "images"), "--output", str(tmp_path / "e.npz")]
    error = error_of(capsys, partial(import_module(script).main, argv))
    assert f"{command} is not in files here; a checkpoint names it" in error
    assert "linear.py --checkpoint PATH --dataset" in error
    assert not mark.exists() and not (tmp_path / "webdataset").exists()


@pytest.mark.parametrize("dataset", ["fashion_mnist", "cifar10", "stl10"])
def test_data_set_in_a_checkpoint_is_not_downloaded(run, tmp_path, capsys, monkeypatch, dataset):
    def download(*arguments, **options):
        raise AssertionError("downloads")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", download)
    path, root = tmp_path / "other.pt", tmp_path / "data"
    doctored(run, path, dataset=dataset, val_fraction=None, data_root=str(root))
    error = error_of(capsys, partial(main, ["--checkpoint", str(path), "--device=cpu"]))
    assert f"was not found in {root}; a checkpoint names it" in error and not root.exists()


def test_command_on_the_command_line_is_run(run, tmp_path):
    path = tmp_path / "moved.pt"
    doctored(run, path, dataset="webdataset:moved.tar", val_shards="pipe:false", val_fraction=None)
    shard = run.parent / "shards/train-0.tar"
    argv = ["--checkpoint", str(path), "--dataset", f"webdataset:pipe:cat {shard}"]
    argv += ["--val_fraction", "0.25", "--data_root", str(tmp_path), "--device=cpu"]
    assert 0 <= main(argv) <= 1
    assert len([*(tmp_path / "webdataset").iterdir()]) == 1


def test_the_data_of_a_run_is_named_as_a_whole(run, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--checkpoint", str(run), "--val_shards", "pipe:false"])
    assert ended.value.code == 2 and "--val_shards needs --dataset" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["linear", "embed"])
def test_they_compute_as_the_run_did(run, tmp_path, monkeypatch, script):
    saved = torch.load(run / "last.pt", weights_only=True)
    saved["config"] |= {"tf32": True, "deterministic": True}
    torch.save(saved, tmp_path / "last.pt")
    asked = []
    monkeypatch.setattr(f"{script}.set_arithmetic", lambda options, device: asked.append(options))
    argv = ["--checkpoint", str(tmp_path), "--device=cpu"]
    if script == "embed":
        write_images(tmp_path / "images", {"cat": 1})
        argv += ["--images", str(tmp_path / "images"), "--output", str(tmp_path / "e.npz")]
    import_module(script).main(argv)
    [options] = asked
    assert options.tf32 and options.deterministic


@pytest.mark.parametrize("start", ["linear", "init_from"])
def test_wrong_contents_are_named_wherever_they_are_read(run, tmp_path, capsys, start):
    path = tmp_path / "nan.pt"
    saved = torch.load(run / "last.pt", weights_only=True)
    saved["model"]["encoder.conv1.weight"].fill_(float("nan"))
    torch.save(saved, path)
    if start == "linear":
        act = partial(main, ["--checkpoint", str(path), "--device=cpu"])
    else:
        act = partial(pretrain, tmp_path, "--init_from", path, "--in_chans", 3, *OPTIONS)
    error = error_of(capsys, act)
    assert f"{path} is damaged: its model.encoder.conv1.weight is not finite" in error


def test_encoder_with_wrong_contents_is_named(run, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    weights, about = load_file(run / "encoder.safetensors"), {"model": "small_stem_resnet"}
    for options, message in (("{", "Expecting"), ("[]", "list"), ("{}", "is not finite")):
        path = tmp_path / "encoder.safetensors"
        weights["conv1.weight"].fill_(float("nan") if options == "{}" else 0)
        save_file(weights, path, {**about, "options": options})
        error = error_of(capsys, partial(pretrain, tmp_path, "--init_from", path, *OPTIONS))
        assert str(path) in error and message in error


def test_grey_encoder_sees_through_timms_transform_what_the_run_saw(tmp_path):
    import timm

    write_images(tmp_path / "images", {"cat": 8, "dog": 8})
    dataset = ("--dataset", f"imagefolder:{tmp_path / 'images'}", "--val_fraction", 0.25)
    run = pretrain(tmp_path, *dataset, "--in_chans", 1, *OPTIONS)
    encoder = timm.create_model(f"local-dir:{run / 'export'}", pretrained=True).eval()
    prepare = timm.data.create_transform(**timm.data.resolve_data_config({}, model=encoder))
    image = Image.open(tmp_path / "images/cat/0.png")
    with torch.no_grad():
        assert encoder(prepare(image.convert("L"))[None]).shape == (1, 32)
