"""An encoder by itself: the weights that a run starts from, its head, and what loads it again."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_data_config
from torchvision.transforms.v2 import functional as transforms

import train_fixtures  # noqa: F401  puts train/ on the path
from evaluation.embeddings import encode_stored
from network.weights import write_encoder
from run.errors import UserError
from run.saved_run import open_encoder
from train_fixtures import pretrain, weights, write_images
from train_parts import build_model, build_views, load_data, load_first_weights, options_of


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One step on digits."""
    return pretrain(tmp_path_factory.mktemp("runs"), "--max_steps", 1)


def test_linear_head_sees_embeddings_of_length_one():
    torch.manual_seed(0)  # of some seeds so narrow a network embeds all images as zeros
    config = options_of(model="resnet10", width=4, head="linear", normalize_embedding=True)
    model = build_model(config, channels=1).eval()
    images = torch.rand(3, 1, 8, 8)
    embedded = model.encoder(images)
    expected = (embedded / embedded.norm(dim=1, keepdim=True)) @ model.head.weight.T
    assert (embedded.norm(dim=1) - 1).abs().min() > 0.01
    seen, projected = model(images)
    assert torch.equal(seen, embedded)
    torch.testing.assert_close(projected, expected + model.head.bias)


@pytest.mark.parametrize("source", ["last.pt", "encoder.safetensors", "."])
def test_init_from_starts_with_the_encoder_of_another_run(run, tmp_path, monkeypatch, source):
    import pretrain as script
    from training import build

    started = []

    def describe(*arguments):
        # What the first step of the new run begins with.
        started.append({key: value.clone() for key, value in built[0].state_dict().items()})
        return original(*arguments)

    built, embedder = [], build.build_model
    monkeypatch.setattr(
        build, "build_model", lambda *a, **k: built.append(embedder(*a, **k)) or built[0]
    )
    original = script.describe
    monkeypatch.setattr(script, "describe", describe)
    options = ("--seed", 1, "--head", "linear", "--init_from", run / source)
    other = pretrain(tmp_path, "--max_steps", 1, *options)
    trained = weights(run)
    for key, value in started[0].items():
        if key.startswith("encoder."):
            assert torch.equal(value, trained[key])
            assert torch.equal(load_file(run / "encoder.safetensors")[key[8:]], value)
    # Gone on with, it takes nothing from there once more.
    monkeypatch.setattr(script, "load_first_weights", None)
    pretrain(tmp_path, "--max_steps", 1, *options, "--resume", other)


@pytest.mark.parametrize("source", ["last.pt", "encoder.safetensors"])
def test_init_from_another_model_names_what_differs(run, source):
    def start(channels=1, **options):
        config = options_of(init_from=str(run / source), **options)
        load_first_weights(
            build_model(config, channels=channels).encoder, config, channels=channels
        )

    start(model="resnet10", width=4)
    with pytest.raises(
        UserError, match=r"another model: depth is 10, here 18, width is 4, here 8$"
    ):
        start(model="resnet18", width=8)
    with pytest.raises(UserError, match=r"--init_from .*in_chans is 1, here 3$"):
        start(channels=3, model="resnet10", width=4)
    with pytest.raises(UserError, match="model is small_stem_resnet, here resnet10t"):
        start(model="resnet10t", stem="standard")


def test_unfit_files_to_start_from_are_named(tmp_path):
    foreign, damaged = tmp_path / "foreign.safetensors", tmp_path / "damaged.safetensors"
    save_file({"weight": torch.zeros(1)}, foreign)
    damaged.write_bytes(foreign.read_bytes()[:20])
    number = tmp_path / "number.safetensors"
    save_file({"weight": torch.zeros(1)}, number, {"encoder": "5"})
    for path, message in (
        (foreign, "was not written by pretrain"),
        (number, "was not written by pretrain"),
        (damaged, "cannot read the encoder"),
        (tmp_path / "none.safetensors", "there is no encoder"),
        (tmp_path / "none.pt", "there is no checkpoint"),
        (tmp_path, "there is no checkpoint"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            open_encoder(path)
        assert str(path) in str(raised.value)


@pytest.mark.parametrize("resume", ["none", "auto"])
def test_run_that_finds_no_first_weights_leaves_no_folder(tmp_path, resume):
    start = ("--init_from", tmp_path / "nowhere.safetensors", "--resume", resume)
    with pytest.raises(UserError, match="there is no encoder"):
        pretrain(tmp_path, *start, "--name", "a")
    assert not list(tmp_path.iterdir())
    # What another run wrote there stays.
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.yaml").touch()
    with pytest.raises(UserError):
        pretrain(tmp_path, *start, "--name", "a")
    assert (tmp_path / "a/config.yaml").exists()


def test_pretrained_takes_the_weights_that_timm_loads(monkeypatch):
    def fill(model, **options):
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, 0.5)

    monkeypatch.setattr("timm.models._builder.load_pretrained", fill)
    config = options_of(model="resnet10t", stem="standard", pretrained=True)
    model = build_model(config, channels=1)
    untouched = [parameter.clone() for parameter in model.head.parameters()]
    assert not all((parameter == 0.5).all() for parameter in model.encoder.parameters())
    load_first_weights(model.encoder, config, channels=1)
    assert all((parameter == 0.5).all() for parameter in model.encoder.parameters())
    assert all(map(torch.equal, model.head.parameters(), untouched))


def test_pretrained_weights_that_cannot_be_fetched(monkeypatch):
    def no_network(model, **options):
        raise OSError("Name or service\nnot known")

    monkeypatch.setattr("timm.models._builder.load_pretrained", no_network)
    config = options_of(model="resnet10t", stem="standard", pretrained=True)
    encoder = build_model(config, channels=3).encoder
    with pytest.raises(UserError, match=r"--pretrained: .*resnet10t .*\(Name or service not known"):
        load_first_weights(encoder, config, channels=3)


# In a process that knows nothing of train/.
LOAD_SMALL_STEM = """
import sys
import supcon_kernels
assert "timm" not in sys.modules
import supcon_kernels.small_stem
import timm, torch
network = timm.create_model(f"local-dir:{sys.argv[1]}/export", pretrained=True)
named = timm.create_model("small_stem_resnet", depth=10, width=4, in_chans=1, num_classes=0)
named.load_state_dict(network.state_dict())
torch.save([network.state_dict(), named.eval()(torch.ones(1, 1, 8, 8))], sys.argv[2])
"""


def test_export_of_a_small_stem_is_loaded_by_timm_to_the_bit(run, tmp_path):
    saved = tmp_path / "loaded.pt"
    root = str(Path(__file__).resolve().parent.parent)
    command = [sys.executable, "-c", LOAD_SMALL_STEM, str(run), str(saved)]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": root})
    loaded, output = torch.load(saved)
    trained = load_file(run / "encoder.safetensors")
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[key], trained[key]) for key in trained)
    model = build_model(
        options_of(model="resnet10", width=4, channels_last=False), channels=1
    ).eval()
    model.load_state_dict(weights(run))
    assert torch.equal(output, model.encoder(torch.ones(1, 1, 8, 8)))


def test_small_stem_has_no_weights_and_no_other_depths(caplog):
    with pytest.raises(ValueError, match=r"one of \[10, 18, .*\], not 11"):
        timm.create_model("small_stem_resnet", depth=11)
    with pytest.raises(RuntimeError, match="pretrained"):
        timm.create_model("small_stem_resnet", pretrained=True, width=4)
    timm.create_model("small_stem_resnet", depth=10, width=4)
    assert not [record for record in caplog.records if "configuration" in record.message]


def test_small_stem_without_timm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.models", None)
    monkeypatch.delitem(sys.modules, "supcon_kernels.small_stem")
    with pytest.raises(ImportError, match="pip install timm"):
        importlib.import_module("supcon_kernels.small_stem")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{"model": "resnet10t", "stem": "standard"}, {"model": "resnet10", "width": 4}],
    ids=["standard", "small"],
)
def test_export_rebuilds_encoder_and_input(tmp_path, channels, options):
    write_images(tmp_path / "images", {"cat": 2, "dog": 2}, size=(40, 40))
    config = options_of(
        dataset=f"imagefolder:{tmp_path / 'images'}",
        val_fraction=0.5,
        image_size=35,
        in_chans=channels,
        **options,
    )
    data = load_data(config)
    model = build_model(config, channels=channels).eval()
    # Trained weights: batch statistics that are not those of a fresh network.
    model.encoder.train()(torch.rand(2, channels, 35, 35))
    write_encoder(tmp_path, model.encoder, config.network, data)

    loaded = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    loaded = loaded.to(memory_format=config.network.memory_format)
    expected = model.encoder.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    images, _ = data.test[[0, 1]]
    seen = build_views(config, data).plain(images)
    assert torch.equal(loaded(seen), encode_stored(model, build_views(config, data), images))

    # The input that timm makes of an image of the stored size is the one that we make.
    pictures = [transforms.to_pil_image(image) for image in images]
    prepare = create_transform(**resolve_data_config({}, model=loaded))
    torch.testing.assert_close(torch.stack([prepare(picture) for picture in pictures]), seen)
    classifier = timm.create_model(f"local-dir:{tmp_path / 'export'}", True, num_classes=7)
    assert classifier(seen).shape == (2, 7)


# Pooled wider than its features; built for one size of image; with several kinds of attention; with
# weights that layers share.
@pytest.mark.parametrize(
    "name",
    [
        "mobilenetv3_small_050",
        "vit_tiny_patch16_224",
        "swin_tiny_patch4_window7_224",
        "levit_128s",
        "maxvit_rmlp_pico_rw_256",
        "coat_lite_tiny",
        "convnext_atto",
        "efficientnet_lite0",
    ],
)
def test_models_of_timm_are_built_for_the_size_and_exported(tmp_path, name):
    config = options_of(model=name, stem="standard", image_size=32, channels_last=False)
    model = build_model(config, channels=1).eval()
    images = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        embedded, projected = model(images)
        assert embedded.shape == (2, model.num_features) and projected.shape == (2, 128)
        write_encoder(tmp_path, model.encoder, config.network, load_data(config))
        loaded = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
        assert torch.equal(loaded(images), embedded)


def test_run_of_a_model_whose_width_is_not_its_features(tmp_path):
    model = ("--model", "mobilenetv3_small_050", "--stem", "standard", "--width", 16)
    pretrain(tmp_path, *model, "--image_size", 32, "--probe", "true", "--max_steps", 1)


def test_model_that_cannot_embed_the_images_leaves_no_folder(tmp_path):
    model = ("--model", "efficientformer_l1", "--stem", "standard", "--width", 16)
    with pytest.raises(UserError, match=r"^--model efficientformer_l1 .* 1x32x32, .*\.$") as raised:
        pretrain(tmp_path, *model, "--image_size", 32)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_equal_encoders_are_equal_files_and_older_ones_are_read(tmp_path):
    config = options_of(model="resnet10", width=4)
    encoder, data = build_model(config, channels=1).encoder, load_data(config)
    files = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        write_encoder(tmp_path / name, encoder, config.network, data)
        files.append((tmp_path / name / "encoder.safetensors").read_bytes())
    assert files[0] == files[1]

    about, weights = open_encoder(tmp_path / "one" / "encoder.safetensors")
    options = {key: value for key, value in about.items() if key != "model"}
    older = {"format": "pt", "model": about["model"], "options": json.dumps(options)}
    save_file(weights, tmp_path / "older.safetensors", older)
    assert open_encoder(tmp_path / "older.safetensors")[0] == about
