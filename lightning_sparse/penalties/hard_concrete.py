"""HardConcrete: the penalty equivalent to L0 regularisation with hard concrete gates."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
from torch import Tensor

from lightning_sparse import _checks, numeric, tables
from lightning_sparse.duality import Examples, Penalty


@dataclass(frozen=True)
class HardConcrete(Penalty):
    """omega(w) = min over the gate's log alpha of (w^2 / eta + f) / 2, tabulated with error 1e-6.

    The gate is s = clip(sbar (zeta - gamma) + gamma, 0, 1), sbar = sigmoid((logit(u) + log alpha) / beta), u uniform;
    eta = (E s)^2 / Var s and f = P(s > 0) = sigmoid(log alpha - beta log(-gamma / zeta)), so lam here is twice the
    usual L0 weight. eta_hat follows this curve up to |w| ~ .537 (at the default values), then jumps to inf, where
    omega = 1/2. The dual is the lower envelope of the curve. Slope 1.475 at 0.
    Raises ValueError unless beta > 0, gamma < 0 and zeta > 1, and for a curve without a single branch below the jump.

    Args:
        beta: the gate's temperature.
        gamma: the lower end of the stretched gate, < 0.
        zeta: the upper end of the stretched gate, > 1.
    """

    beta: float = 2 / 3
    gamma: float = -0.1
    zeta: float = 1.1
    examples: ClassVar[Examples] = ({},)

    def __post_init__(self) -> None:
        _checks.positive("beta", self.beta)
        _checks.between("gamma", self.gamma, -float("inf"), 0)
        _checks.between("zeta", self.zeta, 1, float("inf"))

    def _curve(self) -> tables.Curve:
        return _curve(self.beta, self.gamma, self.zeta)

    def omega(self, w: Tensor) -> Tensor:
        return numeric.with_slope(w, self._curve().omega, self.gradient)

    def eta_hat(self, w: Tensor) -> Tensor:
        return self._curve().eta_hat(w)

    def gradient(self, w: Tensor) -> Tensor:
        return self._curve().gradient(w)

    def dual(self, eta: Tensor) -> Tensor:
        return self._curve().dual(eta)

    def dual_slope(self, eta: Tensor) -> Tensor:
        return self._curve().dual_slope(eta)


class _Gate:
    """Moments of the gate as functions of log alpha, by quadrature of P(s > x) over x in [0, 1]."""

    def __init__(self, beta: float, gamma: float, zeta: float) -> None:
        x, weight = np.polynomial.legendre.leggauss(96)
        self.x, self.weight = (x + 1) / 2, weight / 2
        share = (self.x - gamma) / (zeta - gamma)
        self.shift = beta * np.log(share / (1 - share))
        self.start = beta * np.log(-gamma / zeta)

    def __call__(self, log_alpha: tables.Array) -> tuple[tables.Array, tables.Array, tables.Array]:
        """Return w^2 = -df / dv, v = 1 / eta = Var s / (E s)^2 and f = P(s > 0) at each log alpha."""
        from scipy.special import expit

        above = expit(log_alpha[:, None] - self.shift)
        rise = above * expit(self.shift - log_alpha[:, None])
        first, first_rise = above @ self.weight, rise @ self.weight
        second, second_rise = above @ (2 * self.x * self.weight), rise @ (2 * self.x * self.weight)
        v_rise = (second_rise * first - 2 * second * first_rise) / first**3
        f = expit(log_alpha - self.start)
        return -f * expit(self.start - log_alpha) / v_rise, (second - first**2) / first**2, f


@cache
def _curve(beta: float, gamma: float, zeta: float) -> tables.Curve:
    from scipy.optimize import brentq

    gate = _Gate(beta, gamma, zeta)
    coarse = np.linspace(-30, 20, 2001)
    square, v, f = gate(coarse)
    left = int(np.argmax(square * v + f > 1))  # from here on eta = inf is better: its value is 1
    turn = int(np.argmax(np.diff(square) <= 0))
    if not 0 < left < turn:
        raise ValueError(f"HardConcrete(beta={beta:g}, gamma={gamma:g}, zeta={zeta:g}): eta_hat has no single branch below its jump")

    def excess(log_alpha: float) -> float:
        square, v, f = gate(np.array([log_alpha]))
        return float(square[0] * v[0] + f[0] - 1)

    jump = brentq(excess, coarse[left - 1], coarse[left], xtol=1e-14)
    fine = np.linspace(-30, (jump + coarse[turn]) / 2, 40001)
    square, v, f = gate(fine)
    return tables.curve(np.sqrt(square), 1 / v, f, float(np.sqrt(gate(np.array([jump]))[0][0])))
