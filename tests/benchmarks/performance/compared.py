"""Cost in addition to a plain run, relative to a base: a floor, an epoch, or the cost in one tensor."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from performance import rounds


def above(values: Sequence[float], plain: Sequence[float]) -> list[float]:
    """Subtract the plain run of the same round from each value."""
    return [value - base for value, base in zip(values, plain, strict=True)]


def row(cost: Sequence[float], again: Sequence[float], base: tuple[str, Sequence[float]], goal: float | None, of: str) -> dict[str, Any]:
    """Return the medians of ``cost`` (named ``of``) and of the base, and the ratio's median and quartiles over rounds.

    ``again`` is what the plain run takes beyond itself; on top of the base it is the A/A arm, whose ``stray`` from 1 is in
    the base's unit and is taken off the ratio before it is held against the goal.
    """
    name, measure = base
    times = {"base": [*measure], "own": [*cost], rounds.AGAIN: [one + more for one, more in zip(measure, again, strict=True)]}
    found = rounds.ratios(times, "base", {} if goal is None else {"own": goal})
    line, stray = next(one for one in found if one.arm == "own"), rounds.stray(found)
    spread = {"ratio": line.ratio, "low": line.low, "high": line.high, "stray": stray}
    return {of: line.value, name: statistics.median(measure)} | spread | {"goal": goal, "met": line.met(stray)}


def scaled(found: Mapping[str, Any], unit: float, *names: str) -> dict[str, Any]:
    """Convert some values of a row to another unit."""
    return {name: value * unit if name in names else value for name, value in found.items()}
