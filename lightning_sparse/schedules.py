"""The strength lam as a function of the optimiser step."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from lightning_sparse import _checks
from lightning_sparse._construction import Constructed, typed


class Schedule(metaclass=Constructed):
    """lam at an optimiser step. ``share``-like arguments are fractions of the run's total optimiser steps."""

    lam: float  # the value that the schedule ends at

    def __repr__(self) -> str:
        return typed(self)

    @abstractmethod
    def __call__(self, step: float, total: float) -> float:
        """lam >= 0 after ``step`` optimiser steps of ``total``, which is inf in a run without an end."""


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
        _checks.between("share", self.share, 0, 1, closed="r")

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
        _checks.between("begin", self.begin, 0, 1, closed="l")
        _checks.between("end", self.end, self.begin, 1, closed="r")
        _checks.between("start", self.start, 0, self.lam, closed="l")

    def __call__(self, step: float, total: float) -> float:
        t = (step / (total or 1) - self.begin) / (self.end - self.begin)
        return self.lam - (self.lam - self.start) * (1 - min(max(t, 0.0), 1.0)) ** 3  # exactly lam at t = 1


def as_schedule(lam: float | Schedule) -> Schedule:
    """A number becomes :class:`Constant`; a schedule is returned as it is."""
    return lam if isinstance(lam, Schedule) else Constant(_checks.positive("lam", lam))
