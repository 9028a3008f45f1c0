"""Run arms in turn in each round; ratios are to the base of the same round, which runs twice (A/A)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

AGAIN = "A/A"  # the base again
WARM_UP = 1  # first rounds, not counted
Times = dict[str, list[float]]


@dataclass(frozen=True)
class Ratio:
    """Median of an arm's value, and median and quartiles of its ratio to the base of the same round; ``goal`` or None."""

    arm: str
    value: float
    ratio: float
    low: float
    high: float
    goal: float | None = None

    def met(self, stray: float) -> bool | None:
        """Return True if the ratio minus A/A is at most the goal; None without a goal."""
        return None if self.goal is None else self.ratio - stray <= self.goal


def measure(arms: Mapping[str, Callable[[], float]], base: str, rounds: int, warm_up: int = WARM_UP) -> Times:
    """Measure each arm in each round, after ``warm_up`` uncounted rounds. AGAIN is the base, unless given.

    An arm is called once a round and returns what it took, in a unit of its own choice. Every second round goes backwards,
    so that a machine that slows down for a while burdens no arm more than another. AGAIN stands in the middle of the others,
    as far from the base as they are on average.
    """
    others = [name for name in arms if name not in (base, AGAIN)]
    half = len(others) // 2
    order = [base, *others[:half], AGAIN, *others[half:]]
    calls = {AGAIN: arms[base], **arms}
    times: Times = {name: [] for name in (base, *others, AGAIN)}
    for turn in range(warm_up + rounds):
        for name in order if turn % 2 else reversed(order):
            taken = calls[name]()
            if turn >= warm_up:
                times[name].append(taken)
    return times


def ratios(times: Times, base: str, goals: Mapping[str, float] | None = None) -> list[Ratio]:
    """Return one line per arm, in the order of ``times``."""
    return [_ratio(name, times[name], times[base], (goals or {}).get(name)) for name in times]


def _ratio(name: str, values: Sequence[float], base: Sequence[float], goal: float | None) -> Ratio:
    quotients = [value / other for value, other in zip(values, base, strict=True)]
    low, middle, high = statistics.quantiles(quotients, n=4) if len(quotients) > 1 else quotients * 3
    return Ratio(name, statistics.median(values), middle, low, high, goal)


def stray(found: Sequence[Ratio]) -> float:
    """Return A/A: the largest deviation of its quartiles from 1."""
    again = next(line for line in found if line.arm == AGAIN)
    return max(again.high - 1, 1 - again.low, 0.0)


def lines(found: Sequence[Ratio]) -> list[dict[str, Any]]:
    """Convert to rows for a JSON file, with ``met`` for each goal."""
    return [asdict(line) | {"met": line.met(stray(found))} for line in found]
