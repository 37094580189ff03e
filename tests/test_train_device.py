"""What a run sets up on the machine that it finds: arithmetic, its own GPU, random states, caches."""

import os
from unittest.mock import Mock

import pytest
import torch

import train_fixtures  # noqa: F401  puts train/ on the path
from pretrain import main
from run import compiler_caches
from run.compiler_caches import VARIABLES, file_system_of, keep_caches_local
from run.device import DeviceOptions, set_arithmetic
from run.errors import UserError
from run.processes import Ranks, joined
from run.resume import describe_machine, other_machine
from run.seeds import random_state, set_random_state

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
MACHINE = {"world_size": 1, "threads": None, "gpu": "A100", "torch": "2.6.0", "cudnn": 90100}


def arithmetic():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return {
        "deterministic": (cudnn.deterministic, torch.are_deterministic_algorithms_enabled()),
        "benchmark": cudnn.benchmark,
        "tf32": {cudnn.allow_tf32, matmul.allow_tf32},
    }


@pytest.fixture
def restored(monkeypatch):
    """Everything is set back to what torch begins with."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "x")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setenv("TORCHINDUCTOR_DETERMINISTIC", "x")
    monkeypatch.delenv("TORCHINDUCTOR_DETERMINISTIC")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    set_arithmetic(DeviceOptions(), CUDA)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = True


@pytest.mark.parametrize("tf32", [False, True])
def test_cuda_is_fast_or_deterministic(restored, monkeypatch, capsys, tf32):
    for deterministic in (True, False):
        before = arithmetic()
        set_arithmetic(DeviceOptions(deterministic=deterministic, tf32=tf32), CPU)
        assert arithmetic() == before
        set_arithmetic(DeviceOptions(deterministic=deterministic, tf32=tf32), CUDA)
        assert arithmetic() == {
            "deterministic": (deterministic, deterministic),
            "benchmark": not deterministic,
            "tf32": {tf32},
        }
        torch.get_float32_matmul_precision()  # and what else asks torch for it does not raise
        said = capsys.readouterr().out
        assert ("not deterministic: the operations that torch warns of" in said) == deterministic


def test_deterministic_cublas_keeps_what_the_user_set(restored, monkeypatch):
    set_arithmetic(DeviceOptions(deterministic=True), CUDA)
    # A network may take an operation without a deterministic algorithm.
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    set_arithmetic(DeviceOptions(deterministic=True), CUDA)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_checkpoints_say_on_what_they_were_trained(monkeypatch):
    assert describe_machine(CPU, 1)["torch"] == torch.__version__
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "H100")
    monkeypatch.setattr("torch.backends.cudnn.version", lambda: 90200)
    now = describe_machine(CUDA, 1)
    assert (now["gpu"], now["cudnn"]) == ("H100", 90200)
    assert other_machine(MACHINE, MACHINE) is None
    said = other_machine(MACHINE, MACHINE | {"gpu": "H100", "cudnn": 90200})
    assert said.endswith("may differ: gpu is H100, was A100; cudnn is 90200, was 90100")
    assert other_machine({"world_size": 1, "threads": 1}, MACHINE) is None  # from before


def test_random_state_of_mps_is_saved_and_restored(monkeypatch):
    state = torch.arange(4, dtype=torch.uint8)
    restore = Mock()
    monkeypatch.setattr("torch.mps.get_rng_state", lambda: state)
    monkeypatch.setattr("torch.mps.set_rng_state", restore)
    mps = torch.device("mps")
    states = random_state(mps)
    set_random_state(states, mps)
    restore.assert_called_once_with(state)
    set_random_state({"cpu": states["cpu"]}, mps)  # of a run that was on a CPU
    assert restore.call_count == 1


@pytest.mark.parametrize(
    ("visible", "torchrun", "index"),
    [("3", False, 0), ("GPU-8d1f", False, 0), ("3", True, None), (None, False, None)],
    ids=["one per task", "by its name", "one for all", "one GPU"],
)
def test_task_takes_the_only_gpu_that_slurm_shows_it(monkeypatch, visible, torchrun, index):
    for name, value in (("RANK", "2"), ("LOCAL_RANK", "2"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    taken = Mock(side_effect=UserError("far enough"))
    monkeypatch.setattr("torch.cuda.set_device", taken)
    monkeypatch.setattr("run.processes.PATIENCE", 0.0)
    with (
        pytest.raises(UserError, match="no GPU to itself" if index is None else "far enough"),
        joined(CUDA, timeout_minutes=1),
    ):
        pass
    if index is not None:
        taken.assert_called_once_with(index)
        ranks = Ranks(rank=2, world_size=4, local_rank=2, group=Mock())
        assert ranks.own_device(CUDA) == torch.device("cuda", index)


@pytest.fixture
def mounts(monkeypatch, tmp_path):
    """A home on NFS and a disk of the host."""
    home, disk = tmp_path / "my home", tmp_path / "disk"
    home.mkdir()
    disk.mkdir()
    listed = tmp_path / "mounts"
    shown = str(home).replace(" ", "\\040")
    listed.write_text(f"x / ext4 rw 0 0\nserver:/ {shown} nfs4 rw 0 0\nx {disk} xfs rw 0 0\n")
    monkeypatch.setattr(compiler_caches, "MOUNTS", listed)
    monkeypatch.setattr("pathlib.Path.home", lambda: home)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(disk))
    monkeypatch.setattr("getpass.getuser", lambda: "ada")
    for variable in VARIABLES:
        # Also what is set meanwhile is taken back.
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    return home, disk


def test_caches_of_compilers_leave_a_shared_home(mounts, monkeypatch, capsys):
    home, disk = mounts
    assert file_system_of(home / "x") == "nfs4" and file_system_of(disk) == "xfs"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    keep_caches_local()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"
    assert os.environ["TRITON_CACHE_DIR"] == str(disk / "compiled-ada/triton")
    said = f"{home} is shared (nfs4): compiled kernels go to {disk}/compiled-ada"
    assert capsys.readouterr().out == f"{said} (TRITON_CACHE_DIR)\n"
    keep_caches_local()
    assert capsys.readouterr().out == ""


def test_caches_of_compilers_stay_on_a_disk_of_the_host(mounts, monkeypatch):
    monkeypatch.setattr("pathlib.Path.home", lambda: mounts[1])
    keep_caches_local()
    assert not os.environ.keys() & VARIABLES.keys()


def test_run_sets_up_its_machine_before_it_computes(monkeypatch):
    calls = []
    for name in ("set_arithmetic", "keep_caches_local", "pretrain"):
        monkeypatch.setattr(f"pretrain.{name}", lambda *arguments, name=name: calls.append(name))
    main(["--device=cpu"])
    assert calls == ["set_arithmetic", "pretrain"]
    calls.clear()
    main(["--device=cpu", "--compile"])
    assert calls == ["set_arithmetic", "keep_caches_local", "pretrain"]
