"""Calls in many processes at once, so that all cores compile; what breaks in one stays there."""

from __future__ import annotations

import functools
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from gpu.place import Place, first_line

SILENCE_S = 60.0
"""After which no answer is waited for any longer: a process hangs, or died with its call."""

Argument = TypeVar("Argument")


def in_processes(
    place: Place, function: Callable[[Place, Any], Any], arguments: Sequence[Argument]
) -> Iterator[tuple[Argument | None, Any, float, str]]:
    """(argument, result, seconds, failure) of each call as it ends, every one in a fresh process.

    Triton keeps what they compile in its cache on disk, where the next process finds it.
    """
    attempt = functools.partial(_attempt, place, function)
    if place.num_jobs == 1:
        yield from map(attempt, arguments)
        return
    num_processes = min(place.num_jobs, len(arguments))
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(num_processes, maxtasksperchild=1) as pool:
        answers = pool.imap_unordered(attempt, arguments)
        for _ in arguments:
            patience_s = max(1.0, min(SILENCE_S, place.seconds_left))
            try:
                yield answers.next(timeout=patience_s)
            except multiprocessing.TimeoutError:
                if not place.is_late:
                    yield None, None, patience_s, "no answer: a process hangs or has died"
                return


def _attempt(
    place: Place, function: Callable[[Place, Any], Any], argument: Argument
) -> tuple[Argument, Any, float, str]:
    begun_s = time.perf_counter()
    try:
        result, failure = function(place, argument), ""
    except Exception as raised:
        result, failure = None, first_line(raised)
    return argument, result, time.perf_counter() - begun_s, failure
