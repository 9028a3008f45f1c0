"""TargetSparsity: reaches a given share of zeros, by the strength lam where that works in time and by rank where it does not.

The share is a constraint, density(w) <= 1 - target, and lam its multiplier (dual ascent on log lam): log lam rises while the
network is denser than a ramp asks for at that moment, and falls while it is sparser. A second, later ramp is a lower bound:
where the zeros fall below it, the weights of the lowest rank are removed, as in gradual pruning, so that the network
recovers while it still trains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning_sparse import _checks
from lightning_sparse.schedules import Cubic

START = 1e-5  # of lam, where none is given
RISE = 0.9  # share of the way over which the ramp rises; the rest is for the ascent to settle
ROUNDS = 200  # updates on the way
NEAR = 0.002  # a target that is met within this is met
FAR = 0.02  # a share of zeros by rank that is worth a warning
LATE, LAST = 0.25, 0.95  # shares of the way between which the lower bound rises
_GAIN, _DAMPING = 30.0, 1.0
_STEEPEST = 2.5  # the largest error that is acted on
_FASTEST = 0.05  # of log lam per optimiser step, because weights answer only after several steps
_CALMER, _BOLDER, _CALMEST = 0.7, 1.05, 0.1  # what the gain is multiplied by at a change of the error's sign and else, its least
_HIGHEST = 1e6  # times START, or a start above it
_LEAST = 1e-5  # a density of 0 has no logarithm
_NUMBERS = ("log_lam", "error", "t")


class TargetSparsity:
    """lam > 0 on the way to ``target``, a share of zeros in (0, 1), from ``start``; and the share that must be zero by then.

    At the share t of the way, with e = log(density / wanted density):
    ``log lam += gain * e * max(|e|, 1) * dt + damping * (e - e before)``. The wanted share rises as gradual pruning's cubic
    from what is zero at first, and is the target itself from t = RISE on. Raises ValueError for a target outside (0, 1) or a
    start that is not > 0.
    """

    def __init__(self, target: float, start: float = START) -> None:
        self.target = _checks.between("target_sparsity", target, 0, 1)
        self.start = _checks.positive("lam", start)
        self.reset()

    def reset(self) -> None:
        """Before a new fit."""
        self.log_lam, self._error, self._t, self._calm = math.log(self.start), 0.0, 0.0, 1.0
        self.ramp: Cubic | None = None  # from the share of zeros that is found first
        self.ranked = 0.0  # the share of the weights that was removed by rank and was not zero by then

    @property
    def lam(self) -> float:
        """The strength in force."""
        return math.exp(self.log_lam)

    def wanted(self, t: float) -> float:
        """The share of zeros that the ramp asks for at the share ``t`` of the way."""
        return self.ramp(min(t, 1.0), 1.0) if self.ramp else 0.0

    @property
    def asked(self) -> float:
        """The share of zeros that the ramp asked for last."""
        return self.wanted(self._t)

    def least(self, t: float) -> float:
        """The share of zeros at ``t`` below which the lowest ranks are removed: 0 up to LATE, the target from LAST on."""
        return Cubic(self.target, LATE, LAST)(min(t, 1.0), 1.0)

    def climb(self, zeros: float, t: float, way: float = math.inf) -> None:
        """Take in that a share ``zeros`` of the weights is zero at ``t`` of a way of so many optimiser steps."""
        if self.ramp is None:
            self.ramp = Cubic(self.target, 0.0, RISE, start=min(zeros, 0.999 * self.target))
        error = min(max(_log_density(zeros) - _log_density(self.wanted(t)), -_STEEPEST), _STEEPEST)
        passed = max(t - self._t, 0.0)  # resumed for a longer run, t steps back
        self._calm = max(min(self._calm * (_CALMER if error * self._error < 0 else _BOLDER), 1.0), _CALMEST)
        steep = self._calm * _GAIN * error * max(abs(error), 1.0)
        move = steep * passed + _DAMPING * (error - self._error)
        if zeros < self.least(t):
            move = min(move, 0.0)  # a lam that is too slow is not driven to where it would empty the network later
        most = _FASTEST * passed * way if passed else 0.0
        self.log_lam = min(self.log_lam + min(max(move, -2 * most), most), math.log(_HIGHEST * max(self.start, START)))
        self._error, self._t = error, t

    def has_arrived(self, zeros: float) -> bool:
        """Whether the ramp asks for the target, but for NEAR, and a share ``zeros`` meets it: what rests at zero seldom comes back."""
        return self.wanted(self._t) >= self.target - NEAR and zeros >= self.target

    def state_dict(self) -> dict[str, float]:
        """Numbers that continue the ascent exactly."""
        first = {} if self.ramp is None else {"first": self.ramp.start}
        return {"log_lam": self.log_lam, "error": self._error, "t": self._t, "calm": self._calm, "ranked": self.ranked} | first

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.log_lam, self._error, self._t = (float(state[name]) for name in _NUMBERS)
        self._calm, self.ranked = float(state.get("calm", 1.0)), float(state.get("ranked", 0.0))
        self.ramp = Cubic(self.target, 0.0, RISE, start=min(state["first"], 0.999 * self.target)) if "first" in state else None


def _log_density(zeros: float) -> float:
    return math.log(1 - zeros + _LEAST)


def is_state(value: Any) -> bool:
    """Whether it is a TargetSparsity's state: finite numbers."""
    if not isinstance(value, dict) or not set(_NUMBERS) <= value.keys():
        return False
    return all(isinstance(number, float) and math.isfinite(number) for number in value.values()) and 0 <= value.get("first", 0.0) < 1
