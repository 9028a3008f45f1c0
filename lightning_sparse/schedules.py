"""Compute the strength lam: from a schedule over the optimiser steps, or solved for along a ramp to a target share of zeros.

At fixed weights the share of zeros does not fall with lam. So at each point of the ramp lam is the one at which that share is the
ramp's: nothing lags, and nothing can swing. A lam that makes enough zeros within a short run may shrink the other weights more than
training can repair, so it is bounded by a scale read off gradients and weights. Zeros that are then missing are removed by rank, along
the same ramp, as in gradual pruning, which is what remains as lam goes to 0.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_sparse import _checks
from lightning_sparse._construction import Constructed, typed

START = 1e-5  # initial lam if none is given
# share of a run after the search for a target, by default; the second of a network that was trained before, which need not learn first
FINE_TUNED, FINE_TUNED_AGAIN = 0.25, 0.7
RISE = 1.0  # share of the search over which the ramp rises; the support is frozen at its end
ROUNDS, FEWEST, APART = 50, 20, 10  # points of the ramp: at most, at least, and the steps between them in between
NEAR = 0.002  # tolerance of a share of zeros that is there already
_CHANGE = 2.0  # largest factor of lam from one point of the ramp to the next
_PAST = 0.9  # weight of the past in the mean square of the gradients
_TRIES = 6  # bisections of the logarithm of lam
_NUMBERS = ("log_lam", "error", "t")


class Schedule(metaclass=Constructed):
    """Gives lam at an optimiser step. Arguments such as ``share`` are fractions of the run's total optimiser steps."""

    lam: float  # the final value

    def __repr__(self) -> str:
        return typed(self)

    @abstractmethod
    def __call__(self, step: float, total: float) -> float:
        """Return lam >= 0 after ``step`` optimiser steps of ``total``, which is inf in a run without an end."""


@dataclass(frozen=True)
class Constant(Schedule):
    """lam(step) = lam. Raises ValueError unless lam > 0.

    Args:
        lam: the strength.
    """

    lam: float

    def __post_init__(self) -> None:
        _checks.positive("lam", self.lam)

    def __call__(self, step: float, total: float) -> float:
        return self.lam


@dataclass(frozen=True)
class LinearWarmup(Schedule):
    """lam(step) = lam * min(1, step / (share * total)). Raises ValueError unless lam > 0 and 0 < share <= 1.

    Args:
        lam: the strength after the warm-up.
        share: the share of the run's optimiser steps over which lam rises from 0.
    """

    lam: float
    share: float = 0.1

    def __post_init__(self) -> None:
        _checks.positive("lam", self.lam)
        _of_run("share", self.share, 0, "r")

    def __call__(self, step: float, total: float) -> float:
        return self.lam * min(1.0, step / (self.share * (total or 1)))


@dataclass(frozen=True)
class Cubic(Schedule):
    """lam(step) = lam + (start - lam) (1 - t)^3, t rising from 0 to 1 between the shares ``begin`` and ``end`` of the run.

    The shape of gradual pruning's ramp (Zhu and Gupta, arXiv 1710.01878, equation 1).
    Raises ValueError unless lam > 0, 0 <= begin < end <= 1 and 0 <= start < lam.

    Args:
        lam: the strength at the end of the ramp.
        begin: the share of the run's optimiser steps at which the ramp begins.
        end: the share at which it ends.
        start: the strength before the ramp.
    """

    lam: float
    begin: float = 0.0
    end: float = 0.5
    start: float = 0.0

    def __post_init__(self) -> None:
        _checks.positive("lam", self.lam)
        _of_run("begin", self.begin, 0, "l")
        _of_run("end", self.end, self.begin, "r")
        _checks.between("start", self.start, 0, self.lam, closed="l")

    def __call__(self, step: float, total: float) -> float:
        t = (step / (total or 1) - self.begin) / (self.end - self.begin)
        return self.lam - (self.lam - self.start) * (1 - min(max(t, 0.0), 1.0)) ** 3  # exactly lam at t = 1


def _of_run(name: str, value: float, low: float, closed: str) -> None:
    try:
        _checks.between(name, value, low, 1, closed=closed)
    except ValueError as error:
        raise ValueError(f"{error}: it is a share of the run's optimiser steps, not a number of epochs or steps") from None


def as_schedule(lam: object, name: str = "lam") -> Schedule:
    """Convert a number to :class:`Constant`; return a schedule as it is. Raises TypeError, naming the argument, for other types."""
    if isinstance(lam, Schedule):
        return lam
    if callable(lam):  # a class, or a function of the user's
        given = _checks.shown(lam, Schedule)
        raise TypeError(f"{name} must be a number or a Schedule of lightning_sparse.schedules such as LinearWarmup(1e-3), got {given}")
    return Constant(_checks.positive(name, lam))


# -- a target share of zeros -----------------------------------------------------------------------------------------------


def rounds(steps: float) -> int:
    """Return the number of points of the ramp, at which lam is solved for and weights are removed by rank, in a search of ``steps``."""
    return int(min(max(steps / APART, FEWEST), ROUNDS))


class TargetSparsity:
    """Follows a ramp of the share of zeros to ``target``, in (0, 1), and solves for the lam > 0 that gives it.

    The wanted share rises as gradual pruning's cubic from the initial share of zeros, and equals the target from the share t = RISE of
    the search on. Raises ValueError for a target outside (0, 1) or a start that is not > 0.

    Args:
        target: the share of zeros to reach.
        start: the initial lam, from which it moves by a limited factor; None is START until the first solution, which is taken at once.
    """

    def __init__(self, target: float, start: float | None = None) -> None:
        self.target = _checks.share("target_sparsity", target)
        self.start = START if start is None else _checks.positive("lam", start)
        self.is_given = start is not None
        self.reset()

    def reset(self) -> None:
        """Reset before a new fit."""
        self.log_lam, self._t = math.log(self.start), 0.0
        self.ramp: Cubic | None = None  # starts at the first measured share of zeros
        self._floor = 0.0  # share that the ramp of a resumed run had asked for; a longer run's ramp does not go below it
        self.ranked = 0.0  # share of the weights that were removed by rank before they were zero
        self.began = 0.0  # share of the weights that were zero when the run started
        self.gradient, self.free = 0.0, 0.0  # running means; 0 before the first measurement
        self.fine_tuned = FINE_TUNED  # share of the run after the search, where none is given

    def observe_gradients(self, mean_square: float, free: float = 0.0) -> None:
        """Update the running mean square of the loss's gradients, and the share of the weights whose scale does not matter."""
        if math.isfinite(mean_square):
            past = _PAST if self.gradient else 0.0
            self.gradient, self.free = past * self.gradient + (1 - past) * mean_square, past * self.free + (1 - past) * free

    def begin_below(self, most: float) -> None:
        """Lower a given start to ``most`` before the first step."""
        if most > 0:
            self.log_lam = min(self.log_lam, math.log(most))

    @property
    def lam(self) -> float:
        """Return the strength in force."""
        return math.exp(self.log_lam)

    def wanted(self, t: float) -> float:
        """Return the share of zeros that the ramp asks for at the share ``t`` of the search."""
        return max(self.ramp(min(t, 1.0), 1.0), min(self._floor, self.target)) if self.ramp else 0.0

    @property
    def asked(self) -> float:
        """Return the share of zeros that the ramp asked for last."""
        return self.wanted(self._t)

    def advance(self, zeros: float, t: float) -> float:
        """Go on to the share ``t`` of the search, where the share ``zeros`` of weights is zero; return the wanted share."""
        if self.ramp is None:
            self.ramp = Cubic(self.target, 0.0, RISE, start=min(zeros, 0.999 * self.target))
        self._t = t
        return self.wanted(t)

    def solve(self, share: Callable[[], float], most: float) -> None:
        """Set lam, at most ``most``, so that ``share()``, the share of zeros at the lam in force, is the wanted one or just above it.

        Where even the largest lam makes too few zeros, it is taken, and where the smallest makes too many, that one. From one call to
        the next lam changes by a factor of _CHANGE at most, but for the first time without a given start.
        """
        if not 0 < most < math.inf:
            return
        free = not self.is_given and self.log_lam == math.log(self.start)
        change = math.log(_CHANGE)
        low, high = self.log_lam - change, min(self.log_lam + change, max(math.log(most), self.log_lam - change))
        if free:
            low, high = min(low, math.log(most) - 8 * change), math.log(most)
        self.log_lam = high
        if share() <= self.asked or high <= low:
            return
        for _ in range(_TRIES):
            self.log_lam = (low + high) / 2
            low, high = (low, self.log_lam) if share() >= self.asked else (self.log_lam, high)
        self.log_lam = high

    def target_reached(self) -> bool:
        """Return True if the ramp has reached the target."""
        return self.wanted(self._t) >= self.target

    def state_dict(self) -> dict[str, float]:
        """Return the numbers that continue the search exactly."""
        first = {} if self.ramp is None else {"first": self.ramp.start}
        first |= {"began": self.began} if self.began else {}
        first |= {"fine_tuned": self.fine_tuned} if self.fine_tuned != FINE_TUNED else {}
        first |= {"floor": self._floor} if self.ramp is not None and self._floor > self.ramp(min(self._t, 1.0), 1.0) else {}
        numbers = {"log_lam": self.log_lam, "t": self._t, "ranked": self.ranked, "gradient": self.gradient, "free": self.free}
        return numbers | {"error": 0.0} | first  # error, because earlier releases read it

    def load_state_dict(self, state: Mapping[str, Any], target: float | None = None) -> None:
        """Continue from :meth:`state_dict`; ``target`` is that of the saved search if it differs from this one's."""
        self.log_lam, self._t = float(state["log_lam"]), float(state["t"])
        self.ranked, self.gradient = float(state.get("ranked", 0.0)), float(state.get("gradient", 0.0))
        self.free, self.began = float(state.get("free", 0.0)), float(state.get("began", 0.0))
        self.fine_tuned = float(state.get("fine_tuned", FINE_TUNED))
        self.ramp, self._floor = None, 0.0
        if "first" in state:
            before = Cubic(target or self.target, 0.0, RISE, start=min(state["first"], 0.999 * (target or self.target)))
            self.ramp = Cubic(self.target, 0.0, RISE, start=min(state["first"], 0.999 * self.target))
            self._floor = max(before(min(self._t, 1.0), 1.0), float(state.get("floor", 0.0)))


def is_state(value: Any) -> bool:
    """Return True for a TargetSparsity's state: a dict of finite numbers."""
    if not isinstance(value, dict) or not set(_NUMBERS) <= value.keys():
        return False
    return all(isinstance(number, float) and math.isfinite(number) for number in value.values()) and 0 <= value.get("first", 0.0) < 1
