"""LogSum: omega(w) = log(1 + |w| / eps)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_sparse import _checks, numeric
from lightning_sparse.duality import Examples, Penalty


@dataclass(frozen=True)
class LogSum(Penalty):
    """omega(w) = log((|w| + eps) / eps), eta_hat(w) = |w| (|w| + eps). Slope 1 / eps at 0, towards 0 for large weights.

    Dual: f(eta) = 2 log((S + eps) / (2 eps)) - (S - eps)^2 / (4 eta) with S = sqrt(eps^2 + 4 eta).
    Raises ValueError unless eps > 0. 2 LogSum(2) approximates the penalty of variational dropout.

    Args:
        eps: the |w| at which the slope is half of its value at 0.
    """

    eps: float
    examples: ClassVar[Examples] = ({"eps": 2.0}, {"eps": 0.1})

    def __post_init__(self) -> None:
        _checks.positive("eps", self.eps)

    def omega(self, w: Tensor) -> Tensor:
        return torch.log1p(w.abs() / self.eps)

    def eta_hat(self, w: Tensor) -> Tensor:
        size = w.abs()
        return (size + self.eps).mul_(size)

    def gradient(self, w: Tensor) -> Tensor:
        return w.sign().div_(w.abs().add_(self.eps))

    def dual(self, eta: Tensor) -> Tensor:
        w = eta * self._ratio(eta)
        value = 2 * torch.log1p(w / self.eps) - w / (w + self.eps)
        return torch.where(eta == torch.inf, eta, value)

    def dual_slope(self, eta: Tensor) -> Tensor:
        return self._ratio(eta).square()

    def _ratio(self, eta: Tensor) -> Tensor:
        """Return w / eta at the maximiser w (w + eps) = eta, without cancellation near 0 and without overflow."""
        return ((eta + self.eps**2 / 4).sqrt_() + self.eps / 2).reciprocal_()

    def prox(self, w: Tensor, step: Tensor | float) -> Tensor:
        size, lam = w.abs(), torch.as_tensor(step, dtype=w.dtype, device=w.device)
        # stationary points solve (size - x)(x + eps) = step; the larger root is a local minimum
        reach = size + self.eps
        square = reach * reach
        x = (size - 2 * lam / (reach + (square - 4 * lam).clamp_(min=0).sqrt_())).clamp_(min=0)
        zero = (square < 4 * lam) | numeric.farther(x, size, lam * self.omega(x))
        return x * numeric.outside(zero) * w.sign()  # NaN stays NaN
