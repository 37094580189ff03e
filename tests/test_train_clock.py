"""The clock of a step's phases, by a clock that the test turns."""

import pytest
import torch

import train_fixtures  # noqa: F401  puts train/ on the path
from run.clock import PHASES, PhaseClock, shares


class Now:
    """The time in seconds, and what stands in for CUDA events: they hold it when recorded."""

    seconds = 0.0

    def event(self, *, enable_timing):
        assert enable_timing
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, now):
        self.now = now

    def record(self):
        self.seconds = self.now.seconds

    def elapsed_time(self, later):
        return 1e3 * (later.seconds - self.seconds)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_time_belongs_to_the_phase_that_a_mark_closes(device, monkeypatch):
    # Two steps of one second of each phase and three of the loss, then another epoch, which begins
    # after an evaluation of 100 s that is no part of training.
    now, waits = Now(), []
    monkeypatch.setattr("time.perf_counter", lambda: now.seconds)
    monkeypatch.setattr("torch.cuda.Event", now.event)
    monkeypatch.setattr("torch.cuda.synchronize", waits.append)
    clock = PhaseClock(torch.device(device))
    for epoch in range(2):
        clock.begin()
        for _ in range(2):
            for phase in PHASES:
                now.seconds += 3.0 if phase == "loss" else 1.0
                clock.mark(phase)
        assert len(waits) == (epoch if device == "cuda" else 0), "a mark waited for the device"
        assert clock.read() == {phase: 6.0 if phase == "loss" else 2.0 for phase in PHASES}
        now.seconds += 100.0
    clock.begin()
    assert clock.read() == dict.fromkeys(PHASES, 0.0)


def test_shares_are_of_the_sum():
    assert shares({"data": 1.0, "loss": 3.0}) == "data 25%, loss 75%"
    assert shares({"data": 0.0}) == "data 0%"
