"""Calls in many processes at once, so that all cores compile; what breaks in one stays there."""

from __future__ import annotations

import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

from gpu.place import Place, first_line

SILENCE_S = 60.0
"""After which a call is taken to hang."""
POLL_S = 0.2
Function = Callable[[Place, Any], Any]


@dataclass(frozen=True)
class Answer:
    """What became of a call; ``status`` is ok, failed, died, hung or not reached."""

    argument: Any
    result: Any = None
    seconds: float = 0.0
    status: str = "ok"
    detail: str = ""


def in_processes(place: Place, function: Function, arguments: Sequence[Any]) -> Iterator[Answer]:
    """One answer for each argument as its call ends, every one in a fresh process.

    Triton keeps what they compile in its cache on disk, where the next process finds it.
    """
    if place.num_jobs == 1:
        for argument in arguments:
            yield _not_reached(argument) if place.is_late else _attempt(place, function, argument)
        return
    waiting = deque(arguments)
    running: list[_Call] = []
    try:
        while running or (waiting and not place.is_late):
            while waiting and len(running) < place.num_jobs and not place.is_late:
                running.append(_Call(place, function, waiting.popleft()))
            connection.wait([call.pipe for call in running], POLL_S)
            for call in list(running):
                if answer := call.answer():
                    running.remove(call)
                    call.end()
                    yield answer
    finally:
        for call in running:
            call.end()
    yield from map(_not_reached, waiting)


class _Call:
    """One call in a process of its own."""

    def __init__(self, place: Place, function: Function, argument: Any) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.place, self.argument = place, argument
        self.begun_s = time.perf_counter()
        self.pipe, writer = spawn.Pipe(duplex=False)
        self.process = spawn.Process(target=_send, args=(writer, place, function, argument))
        self.process.start()
        writer.close()  # so that the pipe ends with the process

    def answer(self) -> Answer | None:
        """What became of it; None: it is at work."""
        seconds = time.perf_counter() - self.begun_s
        if self.pipe.poll():
            try:
                answer: Answer = self.pipe.recv()
                return answer
            except EOFError:
                self.process.join()
                code = self.process.exitcode
                return Answer(self.argument, None, seconds, "died", f"exit code {code}")
        if self.place.is_late:
            return _not_reached(self.argument)
        if seconds > SILENCE_S:
            return Answer(self.argument, None, seconds, "hung", f"no answer in {SILENCE_S:.0f} s")
        return None

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _send(writer: connection.Connection, place: Place, function: Function, argument: Any) -> None:
    writer.send(_attempt(place, function, argument))


def _attempt(place: Place, function: Function, argument: Any) -> Answer:
    begun_s = time.perf_counter()
    try:
        result, status, detail = function(place, argument), "ok", ""
    except Exception as raised:  # whatever a call raises is its answer
        result, status, detail = None, "failed", first_line(raised)
    return Answer(argument, result, time.perf_counter() - begun_s, status, detail)


def _not_reached(argument: Any) -> Answer:
    return Answer(argument, status="not reached", detail="time is up")
