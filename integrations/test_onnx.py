"""export.py: ONNX Runtime gives the embeddings of the run, and what cannot be exported is named."""

import json

import numpy as np
import onnxruntime
import pytest
import torch

import embed
from export import main
from run.command_line import run_script
from run.saved_run import open_run
from train_fixtures import pretrain, write_images


def export(run, output):
    return main(["--checkpoint", str(run), "--output", str(output)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Class folders of colour images, and a run of one step on them."""
    root = tmp_path_factory.mktemp("runs")
    write_images(root / "images", {"cat": 5, "dog": 4})
    dataset = ("--dataset", f"imagefolder:{root / 'images'}", "--val_fraction", 0.2)
    return root, pretrain(root, *dataset, "--batch_size=4", "--max_steps=2", "--ema_decay=0.9")


@pytest.mark.parametrize("encoder", ["small_stem", "vit"])
def test_same_embeddings_for_any_number_of_images(folder, tmp_path, encoder):
    run = folder[1]
    if encoder == "vit":
        vit = ("--model=test_vit", "--stem=standard", "--width=16", "--image_size=32")
        run = pretrain(tmp_path, *vit, "--batch_size=4", "--max_steps=1")
    saved = open_run(run / "last.pt")
    size, data = saved.options.data.image_size, saved.about_images
    images = torch.randn(7, data["channels"], size, size)
    with torch.no_grad():
        expected = saved.network().encoder.eval()(images).numpy()

    session = onnxruntime.InferenceSession(export(run / "last.pt", tmp_path / "e.onnx"))
    for rows in (1, 7):
        (embeddings,) = session.run(None, {"images": images[:rows].numpy()})
        np.testing.assert_allclose(embeddings, expected[:rows], rtol=1e-4, atol=1e-5)
    written = session.get_modelmeta().custom_metadata_map
    about = {key: json.loads(value) for key, value in written.items()}
    assert about == {
        "resize_size": data["stored_size"],
        "crop_size": size,
        **{key: data[key] for key in ("mean", "std", "classes")},
    }


def test_the_example_embeds_files_as_embed_py(folder, tmp_path, monkeypatch, run_example):
    root, run = folder
    files = sorted((root / "images").rglob("*.png"))
    output = export(run, tmp_path / "encoder.onnx")
    monkeypatch.setattr("sys.argv", ["onnx_embed.py", str(output), *map(str, files)])
    found = run_example("onnx_embed")
    embeddings = tmp_path / "e.npz"
    options = [f"--checkpoint={run}", f"--images={root / 'images'}", f"--output={embeddings}"]
    embed.main([*options, "--device=cpu"])
    expected = np.load(embeddings)["embeddings"]
    np.testing.assert_allclose(found["embeddings"], expected, rtol=1e-4, atol=1e-5)


def test_unfit_options_are_named_in_one_line(tmp_path, capsys):
    for output, message in (("e.pt", "an .onnx file is needed"), ("no/e.onnx", "no folder")):
        with pytest.raises(SystemExit) as ended:
            export(tmp_path, tmp_path / output)
        assert ended.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: export(tmp_path / "nowhere", tmp_path / "e.onnx"))
    error = capsys.readouterr().err
    assert ended.value.code == 1 and error.count("\n") == 1 and "there is no checkpoint" in error
