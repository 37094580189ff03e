"""Making the runs of a study: in their order, several at once, as far as a budget reaches."""

import time
from collections.abc import Collection
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from reproduction.processes import killed_on_error
from reproduction.runs import Job, Study
from run.errors import UserError


def make(study: Study, jobs: list[Job], budget: float, *, at_once: int = 1) -> None:
    """Make the runs that are not done, as far as a number of seconds reaches.

    They start in order. One that waits for another lets those behind it start first. The first of a
    study runs alone: it may have to download the data.
    """
    began, left = time.monotonic(), [job for job in jobs if study.record(job) is None]
    has_data = len(left) < len(jobs)
    print(f"{len(jobs) - len(left)} of {len(jobs)} runs are done", flush=True)
    left_out = []
    running: dict[Future[None], Job] = {}
    # A process ends with the thread that started it: the threads of a pool live as long as the pool.
    with ThreadPoolExecutor(at_once) as pool, killed_on_error():
        while left or running:
            # One may have the options of another, which was made meanwhile.
            left = [job for job in left if study.record(job) is None]
            is_full = len(running) >= (at_once if has_data else 1)
            job = None if is_full else _next(study, left, running.values())
            if job is None:
                _finish(running)
                has_data = True
                continue
            left.remove(job)
            spent, rate = time.monotonic() - began, seconds_per_pass(study, jobs)
            if budget == 0 or spent + rate * study.cost(job) > budget:
                left_out.append(job)
                continue
            remaining = rate * sum(map(study.cost, [job, *left, *running.values()])) / at_once
            said = f"about {duration(remaining)} left" if rate else "time left not known yet"
            following = f", then {left[0]}" if left else ""
            print(f"{job} ({said}{following})", flush=True)
            running[pool.submit(study.do, job)] = job
    if left_out:
        print(f"left out, the budget is too small: {len(left_out)} runs, the first {left_out[0]}")


def _next(study: Study, left: list[Job], running: Collection[Job]) -> Job | None:
    """The first that can start beside those that run; None: all wait for them."""
    written = {folder for job in running for folder in study.written(job)}
    for job in left:
        if study.ready(job) and written.isdisjoint(study.written(job)):
            return job
    # What the first one waits for has failed or was left out: it is for the study to say which.
    return left[0] if left and not running else None


def _finish(running: dict[Future[None], Job]) -> None:
    """Wait until some run has ended, and drop it; say it if it failed."""
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        job = running.pop(future)
        try:
            future.result()
        except UserError as error:
            print(f"{job} failed: {error}", flush=True)
        except SystemExit:  # it was asked to stop, as the others were, which save as well
            wait(running)
            raise


def seconds_per_pass(study: Study, jobs: list[Job]) -> float:
    """What a pass over the training images has taken so far; 0: nothing is known."""
    records = [study.record(job) for job in jobs if not job.corrupted]
    done = [record for record in records if record is not None and record["cost"] > 1]
    passes = sum(record["cost"] for record in done)
    return sum(record["seconds"] for record in done) / passes if passes else 0.0


def duration(seconds: float) -> str:
    """As it is read."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
