"""Time functions against each other in one run: interleaved rounds, medians, and the base twice (A/A) as the measure of noise.

With one thread on the CPU the clock counts the thread's own time, because on a busy machine the turns of other processes are no latency
of the network; else it is the wall clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

AGAIN = "A/A"  # the base a second time
MEANING = f"{AGAIN}: the given network against itself"
_CALL_SECONDS = 5e-4  # a fast function is called until one measurement takes this long, because a clock has its own cost
_MOST_CALLS = 200


@dataclass(frozen=True)
class Timing:
    """Median time of a function, and how many times faster than the base of the same round it is.

    Args:
        seconds: median of the rounds.
        times_faster: median over the rounds of (seconds of the base) / (seconds of this function).
        low: lower quartile of that ratio.
        high: upper quartile of that ratio.
    """

    seconds: float
    times_faster: float
    low: float
    high: float

    def gains(self, again: Timing) -> bool:
        """Return True if the lower quartile is above 1 and above what the base differs by from itself, ``again``."""
        return self.low > max(again.high, 1.0)


def measure(
    arms: Mapping[str, Callable[[], object]],
    base: str,
    budget: float = 0.3,
    rounds: tuple[int, int] = (5, 31),
    clock: Callable[[], float] | None = None,
) -> dict[str, Timing]:
    """Time each function once a round and return {name: Timing}, with the base a second time under ``AGAIN``.

    Each second round runs backwards, so that a machine that slows down burdens no function more than another.

    Args:
        arms: the functions. A module among them is called in the mode that it is in: put it in evaluation mode first.
        base: the name of the function that the others are compared with.
        budget: seconds that all rounds may take; the least number of rounds is run in any case.
        rounds: the least and the largest number of rounds.
        clock: returns seconds; None is the clock described above. Give ``time.perf_counter`` for functions that wait for a device.
    """
    clock = clock or (time.thread_time if torch.get_num_threads() == 1 else time.perf_counter)
    calls = {base: arms[base], AGAIN: arms[base], **{name: arm for name, arm in arms.items() if name != base}}
    repeats = {name: _repeats(call, clock) for name, call in arms.items()}
    repeats[AGAIN] = repeats[base]
    taken: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for turn in range(rounds[1]):
        if turn >= rounds[0] and time.perf_counter() - began > budget:
            break
        for name in list(calls) if turn % 2 else reversed(calls):
            calls[name]()  # not timed, because what ran before has filled the caches with its own weights
            taken[name].append(_seconds(calls[name], repeats[name], clock))
    return {name: _timing(seconds, taken[base]) for name, seconds in taken.items()}


def _repeats(call: Callable[[], object], clock: Callable[[], float]) -> int:
    _seconds(call, 1, clock)  # the first call may allocate and compile
    return max(1, min(_MOST_CALLS, round(_CALL_SECONDS / max(_seconds(call, 1, clock), 1e-9))))


def _seconds(call: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    began = clock()
    for _ in range(repeats):
        call()
    return (clock() - began) / repeats


def _timing(own: list[float], base: list[float]) -> Timing:
    ratios = [other / mine for other, mine in zip(base, own, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Timing(statistics.median(own), middle, low, high)
