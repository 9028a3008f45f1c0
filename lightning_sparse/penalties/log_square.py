"""LogSquare: omega(w) = log(1 + w^2 / eps)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_sparse import _checks
from lightning_sparse.duality import Examples, Penalty


@dataclass(frozen=True)
class LogSquare(Penalty):
    """omega(w) = log((w^2 + eps) / eps), eta_hat(w) = (w^2 + eps) / 2. No exact zeros; large weights hardly shrink.

    Dual: f(eta) = 2 (r - 1 - log r) with r = eps / (2 eta) for eta >= eps / 2, else 0.
    Raises ValueError unless eps > 0.

    Args:
        eps: the penalty grows only logarithmically for w^2 > eps.
    """

    eps: float
    examples: ClassVar[Examples] = ({"eps": 1.0}, {"eps": 0.01})

    def __post_init__(self) -> None:
        _checks.positive("eps", self.eps)

    def omega(self, w: Tensor) -> Tensor:
        return torch.log1p(w * w / self.eps)

    def eta_hat(self, w: Tensor) -> Tensor:
        return (w * w + self.eps) / 2

    def gradient(self, w: Tensor) -> Tensor:
        return 2 / (w + self.eps / w)

    def dual(self, eta: Tensor) -> Tensor:
        r = (self.eps / (2 * eta)).clamp(max=1)
        excess = 1 - r
        series = excess**2 * (1 / 2 + excess * (1 / 3 + excess * (1 / 4 + excess / 5)))  # -log r - excess, without cancellation
        return 2 * torch.where(excess < 1e-3, series, -r.clamp(min=torch.finfo(r.dtype).tiny).log() - excess)
