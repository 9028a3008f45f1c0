"""Timings are ratios of interleaved calls, and the base runs twice."""

from __future__ import annotations

import pytest

from lightning_sparse.export import latency


class Clock:
    """A clock that functions move."""

    def __init__(self):
        self.now = 0.0

    def work(self, seconds):
        def call():
            self.now += seconds() if callable(seconds) else seconds

        return call


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(latency.time, "perf_counter", lambda: made.now)  # bounds the rounds
    monkeypatch.setattr(latency.torch, "get_num_threads", lambda: 2)  # so that it is the clock of the functions too
    return made


def test_one_thread_counts_its_own_time_and_several_the_wall_clock(clock, monkeypatch):
    own = Clock()
    monkeypatch.setattr(latency.time, "thread_time", lambda: own.now)

    def work():
        clock.now += 0.02
        own.now += 0.01  # half of the time was another process's turn

    for threads, seconds in ((1, 0.01), (2, 0.02)):
        monkeypatch.setattr(latency.torch, "get_num_threads", lambda threads=threads: threads)
        assert latency.measure({"dense": work}, "dense")["dense"].seconds == pytest.approx(seconds)
    assert latency.measure({"dense": work}, "dense", clock=lambda: own.now)["dense"].seconds == pytest.approx(0.01)


def test_ratios_and_medians(clock):
    found = latency.measure({"dense": clock.work(0.02), "sparse": clock.work(0.005)}, "dense")
    assert found["sparse"].seconds == pytest.approx(0.005)
    assert found["sparse"].times_faster == pytest.approx(4)
    assert found[latency.AGAIN].times_faster == pytest.approx(1)
    assert list(found) == ["dense", "A/A", "sparse"]


def test_a_machine_that_slows_down_burdens_all_alike(clock):
    def slower():
        return 0.01 * (1 + clock.now)

    found = latency.measure({"dense": clock.work(slower), "sparse": clock.work(slower)}, "dense", budget=1e9, rounds=(20, 20))
    assert found["sparse"].times_faster == pytest.approx(1, abs=0.02)


def test_the_budget_bounds_the_rounds_but_for_the_least_number(clock):
    calls = []

    def work():
        calls.append(1)
        clock.now += 1.0

    latency.measure({"dense": work}, "dense", budget=0.0, rounds=(5, 31))
    assert len(calls) == 2 * (2 * 5) + 2  # the base twice a round, each after a call that is not timed, and two calls to count repeats


def test_fast_functions_are_called_often_enough_for_the_clock(clock):
    calls = []

    def work():
        calls.append(1)
        clock.now += 1e-5

    latency.measure({"dense": work}, "dense", rounds=(5, 5))
    assert len(calls) == 2 * 5 * 51 + 2
