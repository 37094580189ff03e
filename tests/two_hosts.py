"""Training on two hosts, one of which loses its network: network namespaces of this machine.

Run by hand, as root, with Debian's iproute2: pytest -n0 tests/two_hosts.py. It takes minutes.
"""

import os
import shutil
import subprocess
import sys
import time

import pytest

import train_fixtures  # noqa: F401  puts train/ on the path
from train_fixtures import TINY, TRAIN, metrics
from train_parts import load_checkpoint

FIRST, SECOND = "supcon-host-0", "supcon-host-1"
ADDRESSES = {FIRST: "10.177.93.1", SECOND: "10.177.93.2"}
NUM_STEPS = 200
# A process waits half a minute for another; the rest is for torchrun and a busy machine.
SECONDS_TO_END = 150


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def can_make_hosts() -> bool:
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    made = subprocess.run(["ip", "netns", "add", FIRST], capture_output=True).returncode == 0
    return made and subprocess.run(["ip", "netns", "del", FIRST]).returncode == 0


@pytest.fixture
def hosts():
    """Two namespaces with a cable between them; each end has its host's name as an interface."""
    try:
        for host in ADDRESSES:
            ip("netns", "add", host)
            ip("-n", host, "link", "set", "lo", "up")
        ends = ("type", "veth", "peer", "name", "cable", "netns", SECOND)
        ip("-n", FIRST, "link", "add", "cable", *ends)
        for host, address in ADDRESSES.items():
            ip("-n", host, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", host, "link", "set", "cable", "up")
        yield
    finally:
        for host in ADDRESSES:
            subprocess.run(["ip", "netns", "del", host], capture_output=True)


def start(folder, *options: str) -> list[subprocess.Popen]:
    """Start the two processes of each host, whose run is in a folder of that host alone."""
    started = []
    for number, host in enumerate(ADDRESSES):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            "--nproc-per-node=2",
        ]
        command += [f"--node-rank={number}", f"--master-addr={ADDRESSES[FIRST]}"]
        command += ["--master-port=29517", str(TRAIN / "pretrain.py"), *TINY, *options]
        command += ["--batch_size=64", f"--max_steps={NUM_STEPS}", "--epochs=99", "--knn_every=0"]
        command += ["--save_every=5", "--timeout_minutes=0.5", f"--output_dir={folder / host}"]
        started.append(
            subprocess.Popen(
                ["ip", "netns", "exec", host, *command, "--name=run", "--resume=auto"],
                env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
    return started


@pytest.mark.skipif(not can_make_hosts(), reason="no right to make network namespaces")
def test_host_that_loses_its_network_ends_the_job_which_goes_on_later(hosts, tmp_path):
    run = tmp_path / FIRST / "run"
    started = start(tmp_path)
    try:
        deadline = time.monotonic() + 120
        while not (run / "step-20.pt").exists():
            assert all(one.poll() is None for one in started), started[0].communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        ip("-n", SECOND, "link", "set", "cable", "down")
        said = [one.communicate(timeout=SECONDS_TO_END)[0] for one in started]
        assert [one.returncode for one in started] == [1, 1], said
        assert all("lost the others" in words for words in said), said
        step = load_checkpoint(run / "last.pt")["state"]["step"]
        assert 20 <= step < NUM_STEPS

        ip("-n", SECOND, "link", "set", "cable", "up")
        started = start(tmp_path)
        said = [one.communicate(timeout=SECONDS_TO_END)[0] for one in started]
        assert [one.returncode for one in started] == [0, 0], said
        assert f"resuming after step {step}" in said[0]
    finally:
        for one in started:
            one.kill()
    assert (run / "results.json").is_file()
    assert [row["step"] for row in metrics(run) if row["loss"]] == [
        str(step) for step in range(1, NUM_STEPS + 1)
    ]
    # The first process alone writes.
    assert not (tmp_path / SECOND).exists()
