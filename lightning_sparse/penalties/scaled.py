"""Scaled: another penalty evaluated at w / t."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_sparse import _checks
from lightning_sparse.duality import Examples, Penalty
from lightning_sparse.penalties.concave import MCP
from lightning_sparse.penalties.log_sum import LogSum


@dataclass(frozen=True)
class Scaled(Penalty):
    """omega(w) = p.omega(w / t), eta_hat(w) = t^2 p.eta_hat(w / t), f(eta) = p.dual(eta / t^2).

    Raises TypeError unless p is a Penalty, ValueError unless t > 0.

    Args:
        p: the penalty to scale.
        t: the scale, in units of the weight.
    """

    p: Penalty
    t: float
    examples: ClassVar[Examples] = ({"p": LogSum(eps=2.0), "t": 0.1}, {"p": MCP(c=1.0), "t": 3.0})

    def __post_init__(self) -> None:
        if not isinstance(self.p, Penalty):
            raise TypeError(f"p must be a Penalty, got {_checks.shown(self.p, Penalty)}; duality.to_penalty turns a mask rule into one")
        _checks.positive("t", self.t)

    @property
    def separable(self) -> bool:  # type: ignore[override]
        return self.p.separable

    def omega(self, w: Tensor) -> Tensor:
        return self.p.omega(w / self.t)

    def eta_hat(self, w: Tensor) -> Tensor:
        return self.t**2 * self.p.eta_hat(w / self.t)

    def gradient(self, w: Tensor) -> Tensor:
        return self.p.gradient(w / self.t) / self.t

    def dual(self, eta: Tensor) -> Tensor:
        return self.p.dual(eta / self.t**2)

    def dual_slope(self, eta: Tensor) -> Tensor:
        return self.p.dual_slope(eta / self.t**2) / self.t**2

    def prox(self, w: Tensor, step: Tensor | float) -> Tensor:
        inner = w / self.t
        result = self.t * self.p.prox(inner, step / self.t**2)
        return torch.where(inner.isinf(), w, result)  # w / t may overflow for finite w
