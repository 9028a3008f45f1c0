"""VariationalDropout: the penalty equivalent to variational dropout, for three priors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_sparse import _checks, numeric, tables
from lightning_sparse.duality import Examples, Penalty

_K1, _K2, _K3 = 0.63576, 1.8732, 1.48695  # Molchanov's fit of the KL divergence


@dataclass(frozen=True)
class VariationalDropout(Penalty):
    """omega(w) = min over eta of (w^2 / eta + f(eta)) / 2, where f is twice the KL divergence to the prior:

    - ``log_uniform``: f'(eta) = D(x) / x, x = sqrt(eta / 2), D Dawson's integral; exact, tabulated with error 1e-6;
    - ``molchanov``: f(eta) = 2 (k1 sigmoid(k3 log eta - k2) + log(1 + eta) / 2), the usual fit, error about 2%;
    - ``empirical_bayes``: f(eta) = log(1 + eta); with t = asinh(|w| / 2), omega = t + (1 - e^(-2t)) / 2 and
      eta_hat = e^(2t) - 1.

    Slope 1 at 0; grows like log |w| for large |w|. Raises ValueError with the closest names for an unknown prior.

    Args:
        prior: "log_uniform", "molchanov" or "empirical_bayes".
    """

    prior: str = "log_uniform"
    examples: ClassVar[Examples] = ({"prior": "log_uniform"}, {"prior": "empirical_bayes"}, {"prior": "molchanov"})

    def __post_init__(self) -> None:
        if self.prior not in ("log_uniform", "empirical_bayes", "molchanov"):
            known = [str(example["prior"]) for example in self.examples]
            raise ValueError(f"prior must be one of {known}, got {self.prior!r}{_checks.closest(str(self.prior), known)}")

    def omega(self, w: Tensor) -> Tensor:
        if self.prior == "empirical_bayes":
            t = _asinh(w.abs() / 2)
            return t - torch.expm1(-2 * t) / 2
        return numeric.with_slope(w, _curve(self.prior).omega, self.gradient)

    def eta_hat(self, w: Tensor) -> Tensor:
        if self.prior == "empirical_bayes":
            half = w.abs() / 2
            return 2 * half * (half + torch.hypot(half, torch.ones_like(half)))  # e^(2t) - 1 = 2 sinh(t) e^t
        return _curve(self.prior).eta_hat(w)

    def gradient(self, w: Tensor) -> Tensor:
        if self.prior == "empirical_bayes":
            half = w.abs() / 2
            return w.sign() / (half + torch.hypot(half, torch.ones_like(half)))  # e^-t
        return _curve(self.prior).gradient(w)

    def dual(self, eta: Tensor) -> Tensor:
        if self.prior == "empirical_bayes":
            return torch.log1p(eta)
        if self.prior == "molchanov":
            return 2 * _K1 * torch.sigmoid(_K3 * eta.log() - _K2) + torch.log1p(eta)
        return _curve(self.prior).dual(eta)

    def dual_slope(self, eta: Tensor) -> Tensor:
        if self.prior == "log_uniform":
            return _curve(self.prior).dual_slope(eta)
        own = 1 / (1 + eta)
        if self.prior == "empirical_bayes":
            return own
        gate = torch.sigmoid(_K3 * eta.log() - _K2)
        return own + 2 * _K1 * _K3 * gate * (1 - gate) / eta


def _asinh(x: Tensor) -> Tensor:
    """Return asinh(x) for x >= 0, accurate near 0: log1p(x + x^2 / (1 + sqrt(1 + x^2)))."""
    safe = x.clamp(max=min(1e18, torch.finfo(x.dtype).max))
    near = torch.log1p(safe + safe * (safe / (1 + torch.hypot(safe, torch.ones_like(safe)))))
    return torch.where(x > 1e6, (2 * x.clamp(min=1)).log(), near)


@cache
def _curve(prior: str) -> tables.Curve:
    eta, f, slope = _log_uniform() if prior == "log_uniform" else _molchanov()
    return tables.curve(eta * np.sqrt(slope), eta, f)  # the stationary w: w^2 = eta^2 f'(eta)


def _log_uniform() -> tuple[tables.Array, tables.Array, tables.Array]:
    """Return eta, f and f' with eta = 2 x^2, so f = 4 * integral of D from 0 to x."""
    from scipy.special import dawsn

    x = np.geomspace(1e-5, 1e6, 20001)
    low, high = torch.from_numpy(x[:-1]), torch.from_numpy(x[1:])
    pieces = numeric.integrate(lambda at: torch.from_numpy(dawsn(at.numpy())), low, high).numpy()
    f = 4 * np.concatenate([[x[0] ** 2 / 2], x[0] ** 2 / 2 + np.cumsum(pieces)])
    return 2 * x**2, f, dawsn(x) / x


def _molchanov() -> tuple[tables.Array, tables.Array, tables.Array]:
    from scipy.special import expit

    eta = np.geomspace(1e-9, 1e12, 20001)
    gate = expit(_K3 * np.log(eta) - _K2)
    f = 2 * _K1 * gate + np.log1p(eta)
    return eta, f, 2 * _K1 * _K3 * gate * (1 - gate) / eta + 1 / (1 + eta)
