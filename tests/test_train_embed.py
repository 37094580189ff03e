"""embed.py: the embeddings of a folder of images are those that the evaluation of a run has."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import train_fixtures  # noqa: F401  puts train/ on the path
from embed import find_images, main
from evaluation.embeddings import encode_stored
from linear import main as linear
from run.command_line import run_script
from run.errors import UserError
from train_fixtures import pretrain, weights, write_images
from train_parts import build_model, build_views, load_data, options_of


def embed(run, images, output, *options):
    argv = ["--checkpoint", run, "--images", images, "--output", output, *options]
    return main([*map(str, argv), "--device=cpu"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Class folders of images, and a run of one step on them."""
    root = tmp_path_factory.mktemp("runs")
    write_images(root / "images", {"cat": 5, "dog": 4})
    dataset = ("--dataset", f"imagefolder:{root / 'images'}", "--val_fraction", 0.2)
    options = ("--batch_size", 4, "--max_steps", 1, "--in_chans", 1)
    return root / "images", pretrain(root, *dataset, *options)


def expected(run, dataset, channels, images):
    """The embeddings of stored images by the network in a checkpoint."""
    options = {"image_size": 8, "in_chans": channels, "val_fraction": None}
    if dataset != "digits":
        options["val_fraction"] = 0.2
    config = options_of(dataset=dataset, model="resnet10", width=4, **options)
    model = build_model(config, channels=channels)
    model.load_state_dict(weights(run))
    with torch.no_grad():
        return encode_stored(model, build_views(config, load_data(config)), images)


@pytest.mark.parametrize("workers", [0, 2])
def test_class_folders_give_embeddings_paths_and_labels(folder, tmp_path, capsys, workers):
    images, run = folder
    written = np.load(embed(run, images, tmp_path / "e.npz", "--workers", workers))
    assert written["paths"].tolist() == [
        *(f"cat/{number}.png" for number in range(5)),
        *(f"dog/{number}.png" for number in range(4)),
    ]
    assert written["classes"].tolist() == ["cat", "dog"]
    assert written["labels"].tolist() == [0] * 5 + [1] * 4
    assert written["embeddings"].dtype == np.float32 and written["embeddings"].shape == (9, 32)
    assert "9 embeddings of 32 numbers" in capsys.readouterr().out

    dataset = f"imagefolder:{images}"
    data = load_data(options_of(dataset=dataset, val_fraction=0.2, image_size=8, in_chans=1))
    every = [*data.train.images.files, *data.test.images.files]
    stored = torch.cat([split[[*range(len(split))]][0] for split in (data.train, data.test)])
    for path, row in zip(every, expected(run, dataset, 1, stored).numpy()):
        index = written["paths"].tolist().index(path.removeprefix(f"{images}/"))
        np.testing.assert_allclose(written["embeddings"][index], row, rtol=1e-4, atol=1e-5)


def test_flat_folder_has_no_labels_and_images_of_a_run_in_memory_fit(tmp_path):
    run = pretrain(tmp_path, "--max_steps", 1)
    data = load_data(options_of(image_size=8))
    (tmp_path / "images").mkdir()
    for number, image in enumerate(data.test.images[:3]):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"images/{number}.png")
    for name in ("notes.txt", ".hidden.png"):
        (tmp_path / "images" / name).touch()
    (tmp_path / "images/.cache").mkdir()
    written = np.load(embed(run / "last.pt", tmp_path / "images", tmp_path / "e.npz"))
    assert sorted(written.files) == ["embeddings", "paths"]
    assert written["paths"].tolist() == ["0.png", "1.png", "2.png"]
    rows = expected(run, "digits", 1, data.test.images[:3])
    np.testing.assert_allclose(written["embeddings"], rows.numpy(), rtol=1e-4, atol=1e-5)


def test_folders_that_cannot_be_embedded_are_named(tmp_path):
    write_images(tmp_path / "mixed", {"cat": 1})
    Image.new("RGB", (8, 8)).save(tmp_path / "mixed/0.png")
    (tmp_path / "hollow/cat").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("nowhere", "there is no folder"),
        ("empty", "holds no image"),
        ("hollow", "cat"),
        ("mixed", "images beside folders"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            find_images(tmp_path / name)
        assert f"{tmp_path / name}" in str(raised.value)


def test_older_checkpoint_leaves_the_input_to_the_data_set_of_its_run(folder, tmp_path):
    images, run = folder
    saved = torch.load(run / "last.pt", weights_only=True)
    for key in ("stored_size", "mean", "std"):
        del saved["data"][key]
    torch.save(saved, tmp_path / "old.pt")
    old, new = (
        np.load(embed(path, images, tmp_path / "e.npz")) for path in (tmp_path / "old.pt", run)
    )
    assert np.array_equal(old["embeddings"], new["embeddings"])


@pytest.mark.parametrize("script", ["embed", "linear"])
def test_checkpoint_that_does_not_fit_is_named_in_one_line(folder, tmp_path, capsys, script):
    images, run = folder
    saved = torch.load(run / "last.pt", weights_only=True)
    torch.save(saved | {"config": saved["config"] | {"width": 8}}, tmp_path / "other.pt")
    torch.save({"model": saved["model"]}, tmp_path / "foreign.pt")
    checkpoints = {
        tmp_path / "other.pt": "holds the weights of another model",
        tmp_path / "foreign.pt": "was not written by pretrain.py",
        run / "encoder.safetensors": "is not a readable checkpoint",
        tmp_path / "nowhere": "there is no checkpoint",
    }
    for path, message in checkpoints.items():
        with pytest.raises(SystemExit) as ended:
            if script == "embed":
                run_script(partial(embed, path, images, tmp_path / "e.npz"))
            else:
                run_script(partial(linear, ["--checkpoint", str(path), "--device=cpu"]))
        error = capsys.readouterr().err
        assert ended.value.code == 1 and error.count("\n") == 1
        assert error.startswith("error: ") and str(path) in error and message in error


@pytest.mark.parametrize(
    ("output", "message"),
    [("embeddings.pt", "a .npz file is needed"), ("none/e.npz", "there is no folder")],
)
def test_unfit_output_exits_with_code_2(tmp_path, monkeypatch, capsys, output, message):
    with pytest.raises(SystemExit) as ended:
        embed(tmp_path, tmp_path, tmp_path / output)
    assert ended.value.code == 2
    assert f"--output {tmp_path / output}: " in (error := capsys.readouterr().err)
    assert message in error


@pytest.mark.parametrize("channels_last", [True, False])
def test_filters_and_images_lie_as_in_the_run(tmp_path, monkeypatch, channels_last):
    write_images(tmp_path / "images", {"cat": 3, "dog": 3})
    dataset = ("--dataset", f"imagefolder:{tmp_path / 'images'}", "--val_fraction", 0.4)
    run = pretrain(
        tmp_path, *dataset, "--batch_size", 4, "--max_steps", 1, "--width", 16,
        "--channels_last", channels_last,
    )  # fmt: skip
    seen = []

    def encode(model, views, images):
        seen.extend((model.encoder.layer1[0].conv1.weight, views.plain(images)))
        return encode_stored(model, views, images)

    monkeypatch.setattr("embed.encode_stored", encode)
    embed(run, tmp_path / "images", tmp_path / "e.npz")
    assert len(seen) == 2
    for tensor in seen:
        assert tensor.is_contiguous(memory_format=torch.channels_last) == channels_last
