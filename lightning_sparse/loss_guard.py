"""Lower the strength of a penalty term while it raises the loss too much."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

SLACK = 0.2  # share of the loss's decrease so far that the term may cost
ALL = 1.5  # slack with which only a loss above the initial one lowers the factor
_MEMORY = 0.9  # weight of the past in the mean loss, per step
_LESS, _MORE = 0.8, 1.05  # multipliers of the factor, per step
_LEAST = 1e-6  # the smallest factor
_YOUNG = 10  # steps before the factor is first changed
_NUMBERS = ("factor", "mean", "weight", "first", "best", "steps")


class LossGuard:
    """Gives a factor in (0, 1] for a term, such as the penalty of noise, that must not outweigh the loss.

    It computes the mean loss over about ten steps. If that exceeds ``best + slack (first - best)``, with ``first`` the initial loss and
    ``best`` the lowest mean so far, the factor falls; otherwise it rises back to 1. A term that is too strong for the data then costs
    at most about a fifth of the loss's decrease, instead of all of it (as in a constrained evidence bound).
    """

    def __init__(self, slack: float = SLACK) -> None:
        self.slack = slack
        self.reset()

    def reset(self) -> None:
        """Reset before a new fit."""
        self.factor, self.steps = 1.0, 0
        self.mean = self.weight = 0.0
        self.first, self.best = -math.inf, math.inf

    def observe(self, loss: float) -> None:
        """Update the factor with one step's loss."""
        if not math.isfinite(loss):
            return
        self.mean = _MEMORY * self.mean + (1 - _MEMORY) * loss
        self.weight = _MEMORY * self.weight + 1 - _MEMORY
        self.steps += 1
        mean = self.mean / self.weight
        if self.steps <= _YOUNG:
            self.first = max(self.first, mean)
        self.best = min(self.best, mean)
        if self.steps > _YOUNG:
            too_high = mean > self.best + self.slack * max(self.first - self.best, 0.0)
            self.factor = min(max(self.factor * (_LESS if too_high else _MORE), _LEAST), 1.0)

    def state_dict(self) -> dict[str, float]:
        """Return the numbers that continue the guard exactly."""
        return {name: float(getattr(self, name)) for name in _NUMBERS}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the guard from :meth:`state_dict`."""
        for name in _NUMBERS:
            setattr(self, name, float(state[name]))
        self.steps = int(self.steps)


def is_state(value: Any) -> bool:
    """Return True for a LossGuard's state."""
    return isinstance(value, dict) and set(_NUMBERS) <= value.keys() and all(isinstance(number, float) for number in value.values())
