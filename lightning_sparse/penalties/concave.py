"""MCP and SCAD: linear near 0, constant for large weights. Large weights are not shrunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_sparse import _checks
from lightning_sparse.duality import Examples, Penalty


@dataclass(frozen=True)
class MCP(Penalty):
    """omega(w) = |w| - w^2 / (2c) up to |w| = c, then c/2; eta_hat(w) = c |w| / (c - |w|), inf beyond c.

    Dual: f(eta) = c eta / (eta + c). Raises ValueError unless c > 0.

    Args:
        c: the penalty is constant for |w| >= c.
    """

    c: float
    examples: ClassVar[Examples] = ({"c": 1.0}, {"c": 3.0})

    def __post_init__(self) -> None:
        _checks.positive("c", self.c)

    def omega(self, w: Tensor) -> Tensor:
        size = w.abs().clamp(max=self.c)
        return size - size * size / (2 * self.c)

    def eta_hat(self, w: Tensor) -> Tensor:
        return w.abs() / self._slope(w)

    def gradient(self, w: Tensor) -> Tensor:
        return self._slope(w) * w.sign()

    def _slope(self, w: Tensor) -> Tensor:
        return (1 - w.abs() / self.c).clamp(min=0)

    def dual(self, eta: Tensor) -> Tensor:
        return 1 / (1 / eta + 1 / self.c)

    def prox(self, w: Tensor, step: Tensor | float) -> Tensor:
        size, lam = w.abs(), torch.as_tensor(step, dtype=w.dtype, device=w.device)
        steep = lam >= self.c  # the objective is concave up to c, so the minimiser is 0 or w
        firm = (size - lam).clamp(min=0) / (1 - lam / self.c).masked_fill(steep, 1.0)
        hard = size.masked_fill(size <= (lam * self.c).sqrt(), 0.0)  # NaN stays NaN
        return torch.where(steep, hard, torch.where(size <= self.c, firm, size)) * w.sign()


@dataclass(frozen=True)
class SCAD(Penalty):
    """Slope omega'(w) = 1 below k, then falling linearly to 0 at a k. Formulas, with w short for |w|:

    omega(w) = w for w < k, (2 a k w - w^2 - k^2) / (2 (a-1) k) up to a k, then (a+1) k / 2;
    eta_hat(w) = w, then (a-1) k w / (a k - w), then inf.
    Dual: f(eta) = eta for eta <= k, then k ((a+1) eta - k) / ((a-1) k + eta).
    Raises ValueError unless a > 2 and k > 0.

    Args:
        a: the penalty is constant for |w| >= a k; 3.7 in the literature.
        k: the slope is 1 for |w| <= k.
    """

    a: float
    k: float
    examples: ClassVar[Examples] = ({"a": 3.7, "k": 1.0}, {"a": 2.5, "k": 0.3})

    def __post_init__(self) -> None:
        _checks.between("a", self.a, 2, float("inf"))
        _checks.positive("k", self.k)

    @property
    def _fall(self) -> float:
        return (self.a - 1) * self.k

    def omega(self, w: Tensor) -> Tensor:
        size = w.abs().clamp(max=self.a * self.k)
        excess = size - size.clamp(max=self.k)
        return size - excess * excess / (2 * self._fall)

    def eta_hat(self, w: Tensor) -> Tensor:
        return w.abs() / self._slope(w)

    def gradient(self, w: Tensor) -> Tensor:
        return self._slope(w) * w.sign()

    def _slope(self, w: Tensor) -> Tensor:
        return ((self.a * self.k - w.abs()) / self._fall).clamp(0, 1)

    def dual(self, eta: Tensor) -> Tensor:
        inverse = 1 / eta
        beyond = self.k * (self.a + 1 - self.k * inverse) / (self._fall * inverse + 1)
        return torch.where(eta <= self.k, eta, beyond)

    def prox(self, w: Tensor, step: Tensor | float) -> Tensor:
        size, lam = w.abs(), torch.as_tensor(step, dtype=w.dtype, device=w.device)
        soft = (size - lam).clamp(min=0)
        steep = lam >= self._fall  # the objective is concave from k to a k, so the minimiser is the soft threshold or w
        ramp = (self._fall * size - lam * self.a * self.k) / (self._fall - lam).masked_fill(steep, 1.0)
        convex = torch.where(size <= self.k + lam, soft, torch.where(size <= self.a * self.k, ramp, size))
        return torch.where(steep, self._steep(size, soft.clamp(max=self.k), lam), convex) * w.sign()

    def _steep(self, size: Tensor, soft: Tensor, lam: Tensor) -> Tensor:
        soft_objective = (size - soft) ** 2 / 2 + lam * soft
        unchanged = (size > self.a * self.k) & (lam * (self.a + 1) * self.k / 2 < soft_objective)
        return torch.where(unchanged | size.isinf(), size, soft)
