"""Runs the stages one after another, each in process groups of its own, and keeps the journal.

A part that hangs, or ends its process, costs itself: what is left of its stage goes on in a fresh
process. The schedule is one of moments: a stage that ends early leaves its time to the next.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO

from gpu.journal import Journal
from gpu.place import Place, Row
from gpu.worker import BROKEN_DEVICE

BENCHMARKS = Path(__file__).resolve().parent.parent
IMPORTED = (BENCHMARKS, BENCHMARKS.parent, BENCHMARKS.parent / "tests")
"""Where a stage's imports are, so that nothing has to be installed."""
UNBUFFERED = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
LOG = "log.txt"
LOG_BYTES = 4 << 20
POLL_S = 0.2
GRACE_S = 10.0


@dataclass(frozen=True)
class Stage:
    """One stage of the run.

    Attributes:
        name: of the stage, and of its module in this folder unless ``module`` names another.
        seconds: its share of the time.
        patience_s: silence after which a part is taken to hang.
        in_parallel: whether its parts are shared among ``num_jobs`` processes.
    """

    name: str
    seconds: float
    patience_s: float = 100.0
    in_parallel: bool = False
    module: str = ""


def run_stages(
    stages: Sequence[Stage],
    place: Place,
    journal: Journal,
    minutes: float | None = None,
    after_each: Callable[[], object] = lambda: None,
) -> None:
    """Run them all, in ``minutes`` instead of the sum of their shares if given."""
    total_s = sum(stage.seconds for stage in stages)
    scale = 1.0 if minutes is None else 60 * minutes / total_s
    deadline = time.time()
    for stage in stages:
        deadline += scale * stage.seconds
        _run_stage(stage, replace(place, deadline=deadline), journal)
        after_each()


@dataclass
class _Share:
    """The parts of a stage that one process at a time works on, and that process."""

    index: int
    names: list[str] = field(default_factory=list)
    begun: list[str] = field(default_factory=list)
    current: str | None = None
    process: subprocess.Popen[bytes] | None = None
    pipe: int = -1
    buffer: bytes = b""
    heard_at: float = 0.0
    fresh: bool = True  # whether its process has not begun a part yet


def _run_stage(stage: Stage, place: Place, journal: Journal) -> None:
    begun_at = time.time()
    shares = [_Share(k) for k in range(place.num_jobs if stage.in_parallel else 1)]
    tell = _Teller(stage, journal)
    with open(Path(place.folder) / LOG, "ab") as log:
        try:
            for share in shares:
                _start(share, stage, place, len(shares), log)
            while running := [share for share in shares if share.process]:
                _listen(running, tell)
                _shorten(Path(place.folder) / LOG)
                for share in running:
                    verdict = _verdict(share, stage, place)
                    if verdict is None:
                        continue
                    if verdict.startswith("hung"):
                        _ask_where(share)
                    _end(share)
                    has_more = _conclude(share, verdict, tell)
                    if has_more and not place.is_late:
                        _start(share, stage, place, len(shares), log)
        finally:
            for share in shares:
                if share.process:
                    _end(share)
            _shorten(Path(place.folder) / LOG)
    left = [name for share in shares for name in share.names if name not in share.begun]
    tell.stage_end(time.time() - begun_at, left)


@dataclass
class _Teller:
    """Writes what was said to the journal, and the parts on the terminal."""

    stage: Stage
    journal: Journal
    counts: dict[str, int] = field(default_factory=dict)

    def row(self, item: str | None, row: Row) -> None:
        self.journal.append({"stage": self.stage.name, "item": item, **row})

    def item_end(self, item: str, status: str, detail: str = "") -> None:
        self.counts[status] = self.counts.get(status, 0) + 1
        self.row(item, {"event": "end", "status": status, "detail": detail})
        print(f"{self.stage.name}: {item}: {status} {detail}".rstrip(), file=sys.stderr, flush=True)

    def stage_end(self, seconds: float, left: list[str]) -> None:
        row = {"event": "stage", "seconds": seconds, "counts": self.counts, "not_reached": left}
        self.row(None, row)
        rest = f"; not reached: {len(left)}" if left else ""
        print(f"== {self.stage.name}: {seconds:.0f} s{rest}", file=sys.stderr, flush=True)


def _start(share: _Share, stage: Stage, place: Place, num_shares: int, log: IO[bytes]) -> None:
    reader, writer = os.pipe()
    # A little earlier than the end, so that what a part has begun it can finish.
    soft = replace(place, deadline=place.deadline - min(GRACE_S, 0.1 * stage.seconds))
    order = {
        "module": stage.module or f"gpu.{stage.name}",
        "place": asdict(soft),
        "share": share.index,
        "num_shares": num_shares,
        "done": share.begun,
        "pipe": writer,
    }
    paths = [*map(str, IMPORTED), os.environ.get("PYTHONPATH")]
    share.process = subprocess.Popen(
        [sys.executable, "-m", "gpu.worker", json.dumps(order)],
        stdin=subprocess.PIPE,  # its end tells the worker that this process is gone
        stdout=log,
        stderr=log,
        env=os.environ | UNBUFFERED | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        pass_fds=(writer,),
        start_new_session=True,
    )
    os.close(writer)
    os.set_blocking(reader, False)
    share.pipe, share.buffer, share.heard_at, share.fresh = reader, b"", time.time(), True


def _listen(shares: Sequence[_Share], tell: _Teller) -> None:
    """Take in what the processes say, for a moment at most."""
    ready, _, _ = select.select([share.pipe for share in shares], [], [], POLL_S)
    for share in shares:
        if share.pipe in ready:
            _read(share, tell)


def _read(share: _Share, tell: _Teller) -> None:
    try:
        while told := os.read(share.pipe, 1 << 16):
            share.buffer += told
        time.sleep(POLL_S / 4)  # the other end is closed: the process is about to end
    except BlockingIOError:
        pass
    *lines, share.buffer = share.buffer.split(b"\n")
    for line in lines:
        share.heard_at = time.time()
        _take(share, json.loads(line), tell)


def _take(share: _Share, message: Row, tell: _Teller) -> None:
    event = message.pop("event")
    if event == "items":
        share.names = message["names"]
    elif event == "begin":
        share.current, share.fresh = message["item"], False
        share.begun.append(message["item"])
    elif event == "end":
        share.current = None
        tell.item_end(**message)
    elif event == "row":
        tell.row(share.current, message)
    else:  # the stage itself is skipped or has failed
        tell.item_end("all of it", event.removeprefix("stage "), message["detail"])


def _verdict(share: _Share, stage: Stage, place: Place) -> str | None:
    """Why the process has to be concluded; None: it is at work."""
    assert share.process is not None
    code = share.process.poll()
    if code is not None:
        if code in (0, BROKEN_DEVICE):
            return "ok"
        return f"died: signal {-code}" if code < 0 else f"died: exit code {code}"
    if place.is_late:
        return "time is up"
    if time.time() - share.heard_at > stage.patience_s:
        return f"hung: silent for {stage.patience_s:.0f} s"
    return None


def _ask_where(share: _Share) -> None:
    """Have the process write to the log where it is."""
    assert share.process is not None
    share.process.send_signal(signal.SIGUSR1)
    time.sleep(POLL_S)


def _end(share: _Share) -> None:
    """Kill the process with all that it started."""
    assert share.process is not None and share.process.stdin is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(share.process.pid, signal.SIGKILL)
    share.process.wait()
    share.process.stdin.close()
    share.process = None


def _conclude(share: _Share, verdict: str, tell: _Teller) -> bool:
    """Say how the process ended; answer whether another one has something to do."""
    _read(share, tell)  # its last words
    os.close(share.pipe)
    status, _, detail = verdict.partition(": ")
    if share.current is not None:
        tell.item_end(share.current, "died" if status == "ok" else status, detail)
        share.current = None
    elif share.fresh and status not in ("ok", "time is up"):
        tell.item_end("start of a process", status, detail)
    return not share.fresh and len(share.begun) < len(share.names)


def _shorten(log: Path) -> None:
    """Keep the end of a log that has grown long; its writers append, and need not know."""
    if log.stat().st_size > 2 * LOG_BYTES:
        with open(log, "r+b") as file:
            file.seek(-LOG_BYTES, os.SEEK_END)
            end = file.read(LOG_BYTES)
            file.seek(0)
            file.write(end)
            file.truncate()
