"""Shards of webdataset: which images they hold, where they come from, and what is wrong with one."""

import gzip
import io
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image

import train_fixtures  # noqa: F401  puts train/ on the path
from data.images import Split
from data.shards import read_index
from run.command_line import run_script
from train_fixtures import metrics, pretrain, write_shards
from train_parts import load_data, options_of

OPTIONS = ("--batch_size", 8, "--epochs", 2, "--knn_every", 1)


def add(path, files):
    """Write a tar of files by name."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def image(kind, level):
    packed = io.BytesIO()
    Image.new("RGB", (16, 16), (level,) * 3).save(packed, kind)
    return packed.getvalue()


def everything(split: Split):
    return split[[*range(len(split))]]


@pytest.fixture
def server(tmp_path):
    """Serves tmp_path/shards; gives its URL and the paths that were asked for."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format, *arguments):
            asked.append(self.path)

    handler = partial(Handler, directory=str(tmp_path / "shards"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}", asked
        serving.shutdown()


def test_index_finds_images_of_every_kind_beside_their_labels(tmp_path):
    long = "folder/" + "x" * 150
    shard = add(
        tmp_path / "a.tar",
        {
            "README": b"neither an image nor a label",
            "0.jpg": image("jpeg", 0),
            "0.cls": b"7",
            "0.json": b"{}",
            # Beside more than an image, in either order, with a line end, deep in folders.
            "b/1.cls": b"-3\n",
            "b/1.PNG": image("png", 60),
            f"{long}.webp": image("webp", 120),
            f"{long}.cls": b"900",
            "3.jpeg": image("jpeg", 180),
            "3.txt": b"a caption",
            "3.cls": b"7",
        },
    )
    files, labels = read_index(shard, root=tmp_path)
    assert [file.name for file in files] == ["0.jpg", "b/1.PNG", f"{long}.webp", "3.jpeg"]
    assert labels == [7, -3, 900, 7]
    config = options_of(dataset=f"webdataset:{shard}", val_shards=shard, image_size=14)
    data = load_data(config)
    assert data.classes == ["-3", "7", "900"]
    images, labels = everything(data.train)
    assert labels.tolist() == [1, 0, 2, 1] and images.shape == (4, 3, 16, 16)
    assert (images[:, 0, 0, 0] - torch.tensor([0, 60, 120, 180])).abs().max() <= 1


def test_shards_are_read_in_the_order_of_their_names(tmp_path):
    urls = write_shards(tmp_path, [3, 1, 2])
    files, labels = read_index(urls, root=tmp_path)
    assert [file.name for file in files] == [
        *("0/000.png", "0/001.png", "0/002.png", "1/000.png", "2/000.png", "2/001.png"),
    ]
    assert labels == [0, 1, 0, 0, 0, 1]
    both = read_index(f"{tmp_path}/train-2.tar::{tmp_path}/train-1.tar", root=tmp_path)
    assert both == (files[4:] + files[3:4], labels[4:] + labels[3:4])


def test_images_are_held_out_or_come_from_other_shards(tmp_path):
    urls = write_shards(tmp_path, [12, 8])
    whole = options_of(dataset=f"webdataset:{urls}", val_fraction=0.2)
    data = load_data(whole)
    assert torch.bincount(data.train.labels).tolist() == [8, 8]
    assert torch.bincount(data.test.labels).tolist() == [2, 2]
    assert not {*data.train.images.files} & {*data.test.images.files}
    val = write_shards(tmp_path, [3], name="val")
    data = load_data(options_of(dataset=f"webdataset:{urls}", val_shards=val))
    assert (len(data.train), len(data.test)) == (20, 3)


def test_url_trains_as_its_files_do_with_any_workers_and_is_fetched_once(tmp_path, server):
    url, asked = server
    urls = write_shards(tmp_path / "shards", [11, 3, 7])
    write_shards(tmp_path / "shards", [6], name="val")
    root = tmp_path / "data"
    runs = [
        pretrain(
            tmp_path / f"run{number}", *OPTIONS, "--workers", workers, "--data_root", root,
            "--dataset", f"webdataset:{place}/train-{{0..2}}.tar",
            "--val_shards", f"{place}/val-0.tar",
        )
        for number, (place, workers) in enumerate([(url, 2), (url, 0), (Path(urls).parent, 0)])
    ]  # fmt: skip
    assert [row["step"] for row in metrics(runs[0]) if row["loss"]] == ["1", "2", "3", "4"]
    for run in runs[1:]:
        assert (run / "metrics.csv").read_bytes() == (runs[0] / "metrics.csv").read_bytes()
    assert asked == ["/train-0.tar", "/train-1.tar", "/train-2.tar", "/val-0.tar"]
    assert len([*(root / "webdataset").iterdir()]) == 4


def test_command_is_read_through_webdataset(tmp_path):
    urls = write_shards(tmp_path / "shards", [4])
    files, labels = read_index(f"pipe:cat {urls}", root=tmp_path / "data")
    assert labels == [0, 1, 0, 1]
    (copy,) = (tmp_path / "data/webdataset").iterdir()
    assert {file.shard for file in files} == {str(copy)}
    assert copy.read_bytes() == (tmp_path / "shards/train-0.tar").read_bytes()


def error_of(capsys, folder, urls, *options):
    """The one line that pretrain.py ends with on these shards."""
    dataset = ("--dataset", f"webdataset:{urls}", "--val_fraction", 0.2)
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: pretrain(folder / "runs", *OPTIONS, *dataset, *options))
    error = capsys.readouterr().err
    assert ended.value.code == 1 and error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_image_is_named_with_its_shard(tmp_path, capsys, workers):
    urls = write_shards(tmp_path, [12, 12])
    (file,) = [file for file in read_index(urls, root=tmp_path)[0] if file.name == "1/005.png"]
    with open(file.shard, "r+b") as shard:
        shard.seek(file.offset)
        shard.write(bytes(file.size))
    error = error_of(capsys, tmp_path, urls, "--workers", workers)
    assert f"cannot read the image 1/005.png in {tmp_path}/train-1.tar: cannot identify" in error
    assert "BytesIO" not in error


def second_file(path):
    with tarfile.open(path) as tar:
        return tar.getmembers()[1]


def cut(path, *, field):
    with open(path, "r+b") as file:
        file.truncate(getattr(second_file(path), field))


def overwrite(path, *, byte):
    with open(path, "r+b") as file:
        file.seek(second_file(path).offset)
        file.write(byte * tarfile.BLOCKSIZE)


def compress(path):
    path.write_bytes(gzip.compress(path.read_bytes()))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (Path.unlink, "No such file"),
        (lambda path: path.write_text("no tar" * 500), "invalid header"),
        (lambda path: path.write_bytes(b""), "empty file"),
        (partial(cut, field="offset_data"), "unexpected end of data"),
        # Without an end, and to tarfile whole.
        (partial(cut, field="offset"), "truncated or damaged at byte"),
        (partial(overwrite, byte=b"?"), "truncated or damaged at byte"),
        (partial(overwrite, byte=b"\0"), "truncated or damaged at byte"),
        (compress, "invalid header"),
    ],
    ids=[
        "missing",
        "no tar",
        "empty",
        "in a file",
        "between files",
        "a header",
        "zeros",
        "compressed",
    ],
)
def test_shard_that_is_no_whole_tar_is_named(tmp_path, capsys, damage, reason):
    urls = write_shards(tmp_path, [12, 12])
    damage(tmp_path / "train-1.tar")
    error = error_of(capsys, tmp_path, urls)
    assert f"cannot read the shard {tmp_path}/train-1.tar: " in error and reason in error
    assert "not compressed" in error


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0.png": b"", "1.png": b""}, "the sample 0 has no label (a file 0.cls) beside it"),
        ({"0.png": b"", "0.cls": b"0", "1.cls": b"1"}, "the sample 1 has no image beside it"),
        ({"0.png": b"", "0.cls": b"cat"}, "0.cls in {} is no label: an integer is needed"),
        ({"notes.txt": b""}, "webdataset: {} holds no image (jpg, jpeg, png, webp)"),
    ],
    ids=["label missing", "image missing", "label of words", "no image at all"],
)
def test_unfit_samples_are_named(tmp_path, capsys, files, message):
    shard = add(tmp_path / "a.tar", files)
    error = error_of(capsys, tmp_path, shard)
    assert message.format(shard) in error and shard in error


def test_url_that_does_not_answer_is_named(tmp_path, capsys, server):
    url, _ = server
    for urls, reason in (
        ("http://127.0.0.1:9/a.tar", "Connection refused"),
        (f"{url}/nowhere.tar", "404"),
        ("pipe:false", "exit 1"),
        ("nonsense://x/a.tar", "no gopen handler"),
    ):
        error = error_of(capsys, tmp_path, urls, "--data_root", tmp_path / "data")
        assert f"cannot fetch {urls} to {tmp_path}/data/webdataset: " in error and reason in error
    assert not [*(tmp_path / "data/webdataset").iterdir()]


def test_connection_that_breaks_leaves_no_half_of_a_shard(tmp_path, capsys, server, monkeypatch):
    url, _ = server
    write_shards(tmp_path / "shards", [12])
    content = (tmp_path / "shards/train-0.tar").read_bytes()

    def half(handler, source, output):
        output.write(content[: len(content) // 2])

    monkeypatch.setattr(SimpleHTTPRequestHandler, "copyfile", half)
    error = error_of(capsys, tmp_path, f"{url}/train-0.tar", "--data_root", tmp_path / "data")
    assert "the connection closed" in error and "bytes before the end" in error
    assert not [*(tmp_path / "data/webdataset").iterdir()]


def test_labels_to_evaluate_on_that_training_lacks(tmp_path, capsys):
    urls = write_shards(tmp_path, [12])
    val = write_shards(tmp_path, [6], labels=(1, 4, 5), name="val")
    with pytest.raises(SystemExit):
        run_script(
            lambda: pretrain(
                tmp_path, "--dataset", f"webdataset:{urls}", "--val_shards", val, *OPTIONS
            )
        )
    assert f"error: --val_shards {val}: labels [4, 5] are not in {urls}" in capsys.readouterr().err


def test_one_class_and_too_large_a_batch(tmp_path, capsys):
    urls = write_shards(tmp_path, [12])
    alone = write_shards(tmp_path, [12], labels=(3,), name="alone")
    assert "has one class alone, '3'" in error_of(capsys, tmp_path, alone)
    error = error_of(capsys, tmp_path, urls, "--batch_size", 64)
    assert "--batch_size 64 is larger than the training set of 10 images" in error
    assert not list((tmp_path / "runs").iterdir())
