"""Powers of |w|: Ridge (p = 2), L1 (p = 1) and Lp (0 < p < 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_sparse import _checks, numeric
from lightning_sparse.duality import Examples, Penalty


@dataclass(frozen=True)
class Ridge(Penalty):
    """omega(w) = w^2 / (2c), eta_hat(w) = c: weight decay, or dropout at a constant rate. No exact zeros.

    Dual: 0 for eta <= c, inf above. Raises ValueError unless c > 0.

    Args:
        c: the constant eta; weight decay is lam / c.
    """

    c: float
    examples: ClassVar[Examples] = ({"c": 1.0}, {"c": 0.1})

    def __post_init__(self) -> None:
        _checks.positive("c", self.c)

    def omega(self, w: Tensor) -> Tensor:
        return w * w / (2 * self.c)

    def eta_hat(self, w: Tensor) -> Tensor:
        return torch.full_like(w, self.c)

    def gradient(self, w: Tensor) -> Tensor:
        return w / self.c

    def dual(self, eta: Tensor) -> Tensor:
        return torch.zeros_like(eta).masked_fill(eta > torch.full_like(eta, self.c), torch.inf)

    def prox(self, w: Tensor, step: Tensor | float) -> Tensor:
        return w / (1 + torch.as_tensor(step, dtype=w.dtype, device=w.device) / self.c)


@dataclass(frozen=True)
class L1(Penalty):
    """omega(w) = |w|, eta_hat(w) = |w|. Slope 1 everywhere, so large weights are shrunk too.

    Dual: f(eta) = eta. Prox: soft threshold.
    """

    examples: ClassVar[Examples] = ({},)

    def omega(self, w: Tensor) -> Tensor:
        return w.abs()

    def eta_hat(self, w: Tensor) -> Tensor:
        return w.abs()

    def gradient(self, w: Tensor) -> Tensor:
        return w.sign()

    def dual(self, eta: Tensor) -> Tensor:
        return eta.clone()

    def prox(self, w: Tensor, step: Tensor | float) -> Tensor:
        lam = torch.as_tensor(step, dtype=w.dtype, device=w.device)
        return (w.abs() - lam).clamp(min=0) * w.sign()


@dataclass(frozen=True)
class Lp(Penalty):
    """omega(w) = |w|^p / p, eta_hat(w) = |w|^(2-p), 0 < p < 2. Zero is absorbing for p < 1; no exact zeros for p > 1.

    Dual: f(eta) = eta^q / q with q = p / (2 - p). Prox: closed form for p = 1 and p = 1/2, numeric otherwise.
    Raises ValueError unless 0 < p < 2.

    Args:
        p: the power.
    """

    p: float
    examples: ClassVar[Examples] = ({"p": 0.5}, {"p": 2 / 3}, {"p": 1.0}, {"p": 1.5})

    def __post_init__(self) -> None:
        _checks.between("p", self.p, 0, 2)

    def omega(self, w: Tensor) -> Tensor:
        return self._power(w, self.p) / self.p

    def eta_hat(self, w: Tensor) -> Tensor:
        return w.abs() ** (2 - self.p)

    def gradient(self, w: Tensor) -> Tensor:
        return self._power(w, self.p - 1) * w.sign()

    def dual(self, eta: Tensor) -> Tensor:
        q = self.p / (2 - self.p)
        return eta**q / q

    def prox(self, w: Tensor, step: Tensor | float) -> Tensor:
        if self.p == 1:
            return L1().prox(w, step)
        return _prox_half(w, step) if self.p == 0.5 else numeric.prox(self.omega, w, step)

    @staticmethod
    def _power(w: Tensor, exponent: float) -> Tensor:
        """Return |w|^exponent, with value and gradient 0 at w = 0."""
        zero = w == 0
        return (w.abs().masked_fill(zero, 1.0) ** exponent).masked_fill(zero, 0.0)


def _prox_half(w: Tensor, step: Tensor | float) -> Tensor:
    """Return argmin_x (x - w)^2 / 2 + 2 step sqrt|x|: a trigonometric root of a cubic in sqrt(x) for |w| > 1.5 (2 step)^(2/3), else 0."""
    size, lam = w.abs(), torch.as_tensor(step, dtype=w.dtype, device=w.device)
    zero = (size <= 1.5 * (2 * lam) ** (2 / 3)) | (size == 0)  # NaN stays NaN
    safe = torch.where(~zero & size.isfinite(), size, torch.ones_like(size))
    angle = torch.acos((lam / 2 * (safe / 3) ** -1.5).clamp(max=1))
    share = 2 / 3 * (1 + torch.cos(2 / 3 * (math.pi - angle)))
    return (size * torch.where(size.isinf(), torch.ones_like(share), share)).masked_fill(zero, 0.0) * w.sign()
