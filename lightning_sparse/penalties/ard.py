"""ARD: automatic relevance determination for a linear model. The penalty couples all weights of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_sparse import _checks, numeric
from lightning_sparse.duality import Examples, Penalty


@dataclass(frozen=True, eq=False)
class ARD(Penalty):
    """Omega(w) = min over eta of (sum_j w_j^2 / eta_j + f(eta)) / 2, f(eta) = logdet(I + X diag(eta) X^T / tau).

    ``w`` is the vector of the linear model's d weights. eta_hat is the fixed point eta_j = |w_j| / sqrt(z_j),
    z_j = x_j^T (tau I + X diag(eta) X^T)^-1 x_j. The problem is convex in log eta, so the fixed point is the global
    minimiser. Not separable: ``omega`` and ``dual`` return scalars. Callbacks refuse ARD because a deep network has no X.
    Raises ValueError for a design that is not a finite matrix, for tau <= 0, and for w of another shape.

    Args:
        X: the (n, d) design matrix of the linear model: n samples of d inputs.
        tau: the noise variance of the linear model.
    """

    X: Tensor
    tau: float
    examples: ClassVar[Examples] = (
        {"X": torch.tensor([[1.0, 0.5, -0.2], [0.0, 1.0, 0.3], [0.4, -0.3, 1.0], [1.0, 0.2, 0.1]]), "tau": 0.5},
    )
    separable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _checks.positive("tau", self.tau)
        if not isinstance(self.X, Tensor):
            raise TypeError(f"X must be a (samples, weights) tensor, got {type(self.X).__name__}")
        if self.X.ndim != 2 or not self.X.is_floating_point() or not self.X.isfinite().all():
            raise ValueError(
                f"X must be a finite floating-point matrix (samples, weights), got shape {tuple(self.X.shape)}, {self.X.dtype}"
            )

    @property
    def width(self) -> int:
        """Return the required number of weights in ``w``."""
        return self.X.shape[1]

    def _vector(self, w: Tensor) -> Tensor:
        if w.shape != (self.width,):
            raise ValueError(
                f"ARD is not separable: it takes the vector of {self.width} weights of its linear model, got shape {tuple(w.shape)}"
            )
        if not w.isfinite().all():
            raise ValueError("ARD needs finite weights")
        return w.detach().double()

    def _design(self, like: Tensor) -> Tensor:
        return self.X.detach().to(like.device, torch.float64)

    def _relevance(self, eta: Tensor) -> Tensor:
        """Return z = df / d eta = diag(X^T (tau I + X diag(eta) X^T)^-1 X)."""
        x = self._design(eta)
        covariance = self.tau * torch.eye(len(x), dtype=eta.dtype, device=eta.device) + (x * eta) @ x.T
        relevance: Tensor = (x * torch.linalg.solve(covariance, x)).sum(0)
        return relevance

    def _fixed_point(self, w: Tensor, rounds: int = 20000) -> Tensor:
        size = self._vector(w).abs()
        eta = size
        for _ in range(rounds):
            new = numeric.quotient(size, self._relevance(eta).sqrt())
            converged = torch.allclose(new, eta, rtol=1e-13, atol=0)
            eta = new
            if converged:
                break
        return eta

    def eta_hat(self, w: Tensor) -> Tensor:
        return self._fixed_point(w).to(w.dtype)

    def gradient(self, w: Tensor) -> Tensor:
        return (self._relevance(self._fixed_point(w)).sqrt() * w.detach().double().sign()).to(w.dtype)

    def _value(self, w: Tensor) -> Tensor:
        eta = self._fixed_point(w)
        return ((numeric.quotient(self._vector(w) ** 2, eta).sum() + self.dual(eta)) / 2).to(w.dtype)

    def omega(self, w: Tensor) -> Tensor:
        """Return the scalar Omega(w). Its autograd gradient is w / eta_hat(w)."""
        return numeric.with_slope(w, self._value, self.gradient)

    def dual(self, eta: Tensor) -> Tensor:
        """Return the scalar f(eta)."""
        x, eta64 = self._design(eta), self._vector(eta)
        gram = torch.eye(len(x), dtype=torch.float64, device=eta.device) + (x * eta64) @ x.T / self.tau
        return torch.logdet(gram).to(eta.dtype)
