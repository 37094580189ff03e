"""How batches reach the device: parts that workers decode, shared memory, names in arrays, copies."""

from itertools import islice

import pytest
import torch
import torch.distributed as dist

import train_fixtures  # noqa: F401  puts train/ on the path
from data import batches as loading
from data.batches import Batches, BatchOptions, sequential_batches, training_batches
from data.files import ShardFiles, Strings, in_arrays
from data.images import ImageFiles
from data.prefetch import on_device_ahead
from data.shards import ShardFile
from pretend_cuda import pretend_cuda
from run.errors import UserError
from run.processes import Ranks, joined
from run.requeue import Requests, Requeue
from train_fixtures import write_images
from train_parts import load_data, options_of, training_images

CUDA = torch.device("cuda")


def batch_options(batch_size, workers=0):
    return BatchOptions(batch_size=batch_size, workers=workers)


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, {"cat": 18, "dog": 18})
    return {"dataset": f"imagefolder:{folder}", "val_fraction": 0.25, "image_size": 14}


@pytest.fixture(scope="module")
def options(flat):
    return options_of(**flat)


def whole(batches):
    """All images and labels, batch by batch."""
    return [(images.clone(), labels) for images, labels in batches]


@pytest.mark.parametrize("num_images", [1, 4, 100])
def test_batches_are_the_same_in_whatever_parts_workers_make_them(options, monkeypatch, num_images):
    data = load_data(options)
    split = training_images(options, data)

    def all_batches(workers):
        order, batches = training_batches(split, batch_options(10, workers), seed=0)
        order.begin(1, step=1)
        training = [whole(islice(batches, 1)), whole(batches)]  # once left before its end
        test = sequential_batches(data.train, batch_size=11, workers=workers)
        return [*training, whole(test)]

    expected = all_batches(workers=0)
    monkeypatch.setattr(loading, "IMAGES_PER_PART", num_images)
    torch.testing.assert_close(all_batches(workers=2), expected, rtol=0, atol=0)


def test_worker_decodes_a_part_of_a_batch(options, monkeypatch):
    monkeypatch.setattr(loading, "IMAGES_PER_PART", 4)
    _, batches = training_batches(load_data(options).train, batch_options(10, workers=1), seed=0)
    assert [len(labels) for _, labels in batches.loader] == [4, 4, 2] * 2
    assert [len(labels) for _, labels in batches] == [10, 10]


def test_workers_without_shared_memory_are_refused(flat, monkeypatch, tmp_path):
    options = options_of(**flat | {"image_size": 224})
    split = training_images(options, load_data(options))
    usage = type("usage", (), {"free": 2**20})
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"^--workers 3 needs 105 MiB of .*/dev/shm has 1 MiB free"):
        training_batches(split, batch_options(26, workers=3), seed=0)
    training_batches(split, batch_options(26), seed=0)


def test_names_of_files_come_out_of_arrays_as_they_went_in():
    paths = ["a/é.png", "", "b/\udcff.png", "c" * 300]
    shards = [
        ShardFile("s/0.tar", "a.jpg", 2**40, 7),
        ShardFile("s/1.tar", "b.jpg", 0, 1),
        ShardFile("s/0.tar", "c.jpg", 512, 0),
    ]
    for files, kind in ((paths, Strings), (shards, ShardFiles)):
        packed = in_arrays(files)
        assert isinstance(packed, kind) and in_arrays(packed) is packed
        assert list(packed) == files and packed[-1] == files[-1] and packed[1:] == files[1:]
        # No object for each file.
        assert not any(isinstance(value, list | dict) for value in vars(packed).values())
    assert isinstance(ImageFiles(paths, 8).files, Strings)


def test_copies_to_the_device_are_of_pinned_memory_and_wait_for_nothing(options):
    split = load_data(options).train
    with pretend_cuda() as device:
        batches = Batches(split, [list(range(10))] * 2, 0, CUDA)
        found = [images for images, _ in batches]
        assert found[0].is_cuda and device.waits == {} and len(device.pinned) == 4
        ready = torch.zeros(2).pin_memory()
        ((images, _),) = on_device_ahead([(ready, ready)], CUDA)
        assert images.is_cuda and len(device.pinned) == 5  # it was not copied once more
    assert torch.equal(found[0].inner, split[list(range(10))][0])


def test_processes_of_gpus_agree_over_gloo(monkeypatch):
    asked = []

    def init(backend, **options):
        asked.append(backend)
        raise UserError("far enough")

    store = dist.HashStore()
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    monkeypatch.setattr(dist, "rendezvous", lambda *url, **options: iter([(store, 0, 2)]))
    monkeypatch.setattr("run.processes._of_this_start", lambda store, *rest: store)
    monkeypatch.setattr(dist, "init_process_group", init)
    with pytest.raises(UserError, match="far enough"), joined(CUDA, timeout_minutes=1):
        pass
    assert asked == ["cpu:gloo,cuda:nccl"]


def test_processes_ask_for_signals_every_few_steps(tmp_path):
    asked = []

    class TwoRanks(Ranks):
        def max(self, number):
            asked.append(number)
            return number

    requests = Requests(tmp_path, TwoRanks(world_size=2))
    requests.received = 15
    with pytest.raises(Requeue):
        for step in range(3, 99):
            requests.check(lambda: None, step=step)
    assert step == 8 and asked == [15]
    alone = Requests(tmp_path)
    alone.received = 15
    with pytest.raises(Requeue):
        alone.check(lambda: None, step=3)
