"""Standout: keep probability sigmoid(a |w| + b)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_sparse import _checks
from lightning_sparse.duality import Examples, MaskRule, Penalty


@dataclass(frozen=True)
class Standout(MaskRule):
    """alpha(w) = sigmoid(a |w| + b), so eta_hat(w) = e^(a |w| + b). No exact zeros, because alpha(0) > 0.

    Raises ValueError unless a > 0 and b is in [-50, 50] (outside, alpha is 0 or 1 to float precision).

    Args:
        a: the slope of the logit of the keep probability in |w|.
        b: the logit of the keep probability at w = 0.
    """

    a: float = 1.0
    b: float = 0.0
    examples: ClassVar[Examples] = ({}, {"a": 3.0, "b": -1.0})

    def __post_init__(self) -> None:
        _checks.positive("a", self.a)
        _checks.between("b", self.b, -50, 50, closed="lr")

    def keep_probability(self, w: Tensor) -> Tensor:
        return torch.sigmoid(self.a * w.abs() + self.b)

    def eta_hat(self, w: Tensor) -> Tensor:
        return (self.a * w.abs() + self.b).exp()

    def to_penalty(self) -> Penalty:
        return StandoutPenalty(self.a, self.b)


@dataclass(frozen=True)
class StandoutPenalty(Penalty):
    """omega(w) = e^-b (1 - (1 + u) e^-u) / a^2 with u = a |w|, eta_hat(w) = e^(u + b).

    Dual: with L = log(eta) - b, f(eta) = e^-b (2 - (L^2 + 2 L + 2) e^-L) / a^2 for L >= 0, else 0.
    """

    a: float = 1.0
    b: float = 0.0
    examples: ClassVar[Examples] = Standout.examples

    def __post_init__(self) -> None:
        Standout(self.a, self.b)

    @property
    def _scale(self) -> float:
        return math.exp(-self.b) / self.a**2

    def _reach(self, w: Tensor) -> Tensor:
        """Return u = a |w|, at most 800, because e^-u underflows to 0 there."""
        return (self.a * w.abs()).clamp(max=800)

    def omega(self, w: Tensor) -> Tensor:
        return self._scale * _incomplete_gamma(2, self._reach(w))

    def eta_hat(self, w: Tensor) -> Tensor:
        return (self.a * w.abs() + self.b).exp()

    def gradient(self, w: Tensor) -> Tensor:
        u = self._reach(w)
        return self._scale * self.a * u * (-u).exp() * w.sign()

    def dual(self, eta: Tensor) -> Tensor:
        return 2 * self._scale * _incomplete_gamma(3, (eta.log() - self.b).clamp(0, 800))


def _incomplete_gamma(n: int, u: Tensor) -> Tensor:
    """Return 1 - e^-u (1 + u + ... + u^(n-1) / (n-1)!)."""
    # for u < 0.5 as e^-u times the rest of the series, because the difference would cancel
    head, rest = torch.ones_like(u), torch.ones_like(u)
    for k in range(n - 1, 0, -1):
        head = 1 + u / k * head
    for k in range(n + 12, n, -1):
        rest = 1 + u / k * rest
    decay = (-u).exp()
    return torch.where(u < 0.5, u**n / math.factorial(n) * rest * decay, 1 - head * decay)
