"""HardThreshold: the L0 penalty, a constant for every non-zero weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_sparse import _checks, numeric
from lightning_sparse.duality import Examples, Penalty


@dataclass(frozen=True)
class HardThreshold(Penalty):
    """omega(w) = (tau^2 / 2) 1{w != 0}; eta_hat is 0 at w = 0 and inf elsewhere.

    The slope is 0 for w != 0, so gradient and mask methods never move a weight. Zeros come only from the prox, which
    keeps w where |w| > tau sqrt(step). Dual: tau^2 for eta > 0, 0 at eta = 0.
    Raises ValueError unless tau > 0.

    Args:
        tau: the prox of step 1 sets weights with |w| <= tau to zero.
    """

    tau: float
    examples: ClassVar[Examples] = ({"tau": 0.5},)

    def __post_init__(self) -> None:
        _checks.positive("tau", self.tau)

    def omega(self, w: Tensor) -> Tensor:
        return numeric.with_slope(w, lambda at: (at != 0).to(at.dtype) * (self.tau**2 / 2), torch.zeros_like)

    def eta_hat(self, w: Tensor) -> Tensor:
        return torch.zeros_like(w).masked_fill(w != 0, torch.inf)

    def gradient(self, w: Tensor) -> Tensor:
        return torch.zeros_like(w)

    def dual(self, eta: Tensor) -> Tensor:
        return (eta > 0).to(eta.dtype) * self.tau**2

    def prox(self, w: Tensor, step: Tensor | float) -> Tensor:
        lam = torch.as_tensor(step, dtype=w.dtype, device=w.device)
        return w.masked_fill(w.abs() <= self.tau * lam.sqrt(), 0.0)
