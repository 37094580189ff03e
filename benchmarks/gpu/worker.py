"""A process that runs parts of one stage and says what they yield, a JSON line a message.

The runner starts this file with an order; every part begins, yields rows and ends, and one that
breaks the device ends the process, so that the next part meets a fresh one.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable

from gpu.journal import encode
from gpu.place import Items, Place, Row, Skipped, first_line

BROKEN_DEVICE = 3
"""How a process ends that has said all about its part, but cannot run another."""


def main(order_json: str) -> int:
    order = json.loads(order_json)
    pipe = order["pipe"]
    os.set_inheritable(pipe, False)
    _end_with_the_runner(pipe)
    faulthandler.register(signal.SIGUSR1)  # the runner asks a process that hangs where it does

    def say(event: str, **row: object) -> None:
        os.write(pipe, encode({"event": event, **row}))

    place = Place(**order["place"])
    try:
        items: Items = importlib.import_module(order["module"]).items(place)
    except Skipped as why:
        say("stage skipped", detail=str(why))
        return 0
    except Exception as failure:  # it becomes a row
        traceback.print_exc()
        say("stage failed", detail=first_line(failure))
        return 0
    share = [n for k, n in enumerate(items) if k % order["num_shares"] == order["share"]]
    say("items", names=share)
    for name in share:
        if name in order["done"]:
            continue
        if place.is_late:
            break
        say("begin", item=name)
        status, detail = _run(items[name], say)
        say("end", item=name, status=status, detail=detail)
        if not _device_is_well(place):
            return BROKEN_DEVICE
    return 0


def _run(part: Callable[[], Iterable[Row]], say: Callable[..., None]) -> tuple[str, str]:
    """Say a part's rows; answer how it ended, and a detail."""
    num_left = 0
    try:
        for row in part():
            num_left += row.get("status") == "not reached"
            say("row", **row)
    except Skipped as why:
        return "skipped", str(why)
    except Exception as failure:  # it becomes a row
        traceback.print_exc()
        status = "out of memory" if _is_out_of_memory(failure) else "failed"
        return status, first_line(failure)
    return ("time is up", f"{num_left} not reached") if num_left else ("ok", "")


def _end_with_the_runner(pipe: int) -> None:
    """Have a child kill this process with all that it starts when the runner is gone, however it went.

    Only the runner holds the other end of stdin, so that stdin ends with it.
    """
    if os.fork() == 0:
        os.close(pipe)  # whose end says that the worker has ended
        os.read(sys.stdin.fileno(), 1)
        os.killpg(0, signal.SIGKILL)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, sys.stdin.fileno())
    os.close(nothing)


def _is_out_of_memory(failure: BaseException) -> bool:
    return isinstance(failure, MemoryError) or type(failure).__name__ == "OutOfMemoryError"


def _device_is_well(place: Place) -> bool:
    """Whether the device still answers; memory that nothing holds is given back."""
    torch = sys.modules.get("torch")
    if place.device != "cuda" or torch is None:
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
