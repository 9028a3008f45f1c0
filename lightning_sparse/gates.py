"""The hard concrete gate: a stretched and clipped sigmoid of logistic noise, 0 or 1 with positive probability.

s = clip(sbar (zeta - gamma) + gamma, 0, 1), sbar = sigmoid((logit(u) + log alpha) / beta), u uniform.
Source: Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization", arXiv 1712.01312.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from lightning_sparse import elementwise

LOW, HIGH, NODES = -12.0, 12.0, 4097  # log alpha is clamped to [LOW, HIGH]; the keep probability is 4e-6 and 1 at the ends


@dataclass(frozen=True)
class Gate:
    """A gate s for each entry of ``log_alpha``, and the mask m = s / E s of mean 1.

    Args:
        beta: the gate's temperature.
        gamma: the lower end of the stretched gate, < 0.
        zeta: the upper end of the stretched gate, > 1.
    """

    beta: float = 2 / 3
    gamma: float = -0.1
    zeta: float = 1.1

    def mask(self, log_alpha: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw m and compute its slope dm / dlog_alpha; both have the shape and dtype of ``log_alpha``."""
        inner = log_alpha.clamp(LOW, HIGH)
        u = torch.rand(inner.shape, dtype=inner.dtype, device=inner.device, generator=generator).clamp(1e-6, 1 - 1e-6)
        soft = torch.sigmoid((u.logit() + inner) / self.beta)
        stretched = soft * (self.zeta - self.gamma) + self.gamma
        inside = elementwise.outside((stretched <= 0) | (stretched >= 1))
        rise = (soft * (1 - soft)).mul_((self.zeta - self.gamma) / self.beta).mul_(inside)
        log_mean, growth = self._interpolate(inner, 0)
        scale = (-log_mean).exp_()
        m = stretched.clamp_(0, 1).mul_(scale)
        return m, rise.mul_(scale).addcmul_(m, growth, value=-1)

    def keep_probability(self, log_alpha: Tensor) -> Tensor:
        """Return (E s)^2 / E s^2 of each gate."""
        log_keep, _ = self._interpolate(log_alpha.clamp(LOW, HIGH), 1)
        return log_keep.exp_().clamp_(max=1)

    def open_probability(self, log_alpha: Tensor) -> Tensor:
        """Return P(s > 0) = sigmoid(log alpha - beta log(-gamma / zeta)), the L0 penalty of each gate."""
        return torch.sigmoid(log_alpha - self._shift)

    def open_slope(self, log_alpha: Tensor) -> Tensor:
        """Return dP(s > 0) / dlog_alpha."""
        share = self.open_probability(log_alpha)
        return share * (1 - share)

    @property
    def _shift(self) -> float:
        return self.beta * math.log(-self.gamma / self.zeta)

    def _interpolate(self, inner: Tensor, row: int) -> tuple[Tensor, Tensor]:
        """Return log E s (row 0) or the log keep probability (row 1), interpolated linearly, and its slope in log alpha."""
        values = _moments(self.beta, self.gamma, self.zeta)[row].to(inner)
        step = (HIGH - LOW) / (NODES - 1)
        position = ((inner - LOW) / step).reshape(-1)
        cell = position.int().clamp_(0, NODES - 2)
        start, rise = values.index_select(0, cell), values.diff().index_select(0, cell)
        value = start.addcmul_(rise, position.sub_(cell))
        return value.view(inner.shape), rise.div_(step).view(inner.shape)


@cache
def _moments(beta: float, gamma: float, zeta: float) -> Tensor:
    """Compute log E s and log((E s)^2 / E s^2) at the nodes, by quadrature of P(s > x) over x in [0, 1]."""
    from scipy.special import expit

    node, weight = np.polynomial.legendre.leggauss(96)
    x, weight = (node + 1) / 2, weight / 2
    share = (x - gamma) / (zeta - gamma)
    above = expit(np.linspace(LOW, HIGH, NODES)[:, None] - beta * np.log(share / (1 - share)))
    first, second = above @ weight, above @ (2 * x * weight)
    return torch.from_numpy(np.stack([np.log(first), np.log(first**2 / second)]))
