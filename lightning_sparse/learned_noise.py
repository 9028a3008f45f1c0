"""Gaussian noise of a learned variance on each weight, in two parametrisations: what VariationalDropout trains.

A weight w has the noise variance w^2 / eta; the divergence from a prior is f(eta) / 2.
Source: Molchanov, Ashukha, Vetrov, "Variational Dropout Sparsifies Deep Neural Networks", arXiv 1701.05369.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sparse import noise
from lightning_sparse.duality import Penalty
from lightning_sparse.elementwise import map_chunks

_WIDEST = 69.0  # logarithms of variances are cut off there: 1e-30 to 1e30
LOUDEST = 5.0  # logarithm of the noise's deviation over a weight: more of it no longer changes what is zero, but drowns the loss
LOUDEST_UNDER_SGD = 2.5  # there gradients, and with them steps, grow with the noise; a keep probability of 0.007


class Multiplicative:
    """w (1 + eta^(-1/2) N(0, 1)) with theta = log eta: the noise and its gradient grow with w."""

    def start(self, log_noise: float) -> float:
        """theta where log(1 / eta) is ``log_noise``."""
        return -log_noise

    def bound_(self, w: Tensor, theta: Tensor, loudest: float = LOUDEST) -> None:
        """Bring theta back, in place, from where the noise is e^loudest times the weight."""
        theta.clamp_(min=-2 * loudest)

    def eta(self, w: Tensor, theta: Tensor) -> Tensor:
        return _exp(theta).to(w.dtype)

    def output_noise(self, layer: Any, x: Tensor, theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Noise for the output of a Linear or ConvNd layer; its gradient flows into w, theta and x."""
        return noise.output_noise(layer, x, _Exp.apply(theta, -1.0), generator)

    def deviation(self, w: Tensor, theta: Tensor) -> Tensor:
        """The noise's standard deviation relative to w, with its sign: added = w * deviation * N(0, 1)."""
        return _exp(theta, -0.5, _WIDEST / 2).to(w.dtype)

    def slope(self, added: Tensor) -> Tensor:
        """d added / d theta."""
        return added * -0.5

    def divergence(self, prior: Penalty, w: Tensor, theta: Tensor) -> tuple[Tensor | None, Tensor]:
        """The gradients of f(eta) / 2 in w (none here) and in theta."""
        eta = _exp(theta)
        return None, eta.mul_(prior.dual_slope(eta)).div_(2)


class Additive:
    """w + sigma N(0, 1) with theta = log sigma, eta = w^2 / sigma^2: the gradient in w holds no noise."""

    def start(self, log_noise: float) -> float:
        """theta where log sigma is ``log_noise``."""
        return log_noise

    def bound_(self, w: Tensor, theta: Tensor, loudest: float = LOUDEST) -> None:
        """Bring theta back, in place, from where the noise is e^loudest times the largest of the weights."""
        if w.numel():
            theta.clamp_(max=w.abs().amax().log().add_(loudest).clamp_(min=-_WIDEST))

    def eta(self, w: Tensor, theta: Tensor) -> Tensor:
        return _exp(theta, -2.0).mul_(w).mul_(w).to(w.dtype)

    def output_noise(self, layer: Any, x: Tensor, theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Noise for the output of a Linear or ConvNd layer; its gradient flows into theta and x."""
        return noise.additive_output_noise(layer, x, _Exp.apply(theta, 2.0), generator)

    def deviation(self, w: Tensor, theta: Tensor) -> Tensor:
        """The noise's standard deviation: added = deviation * N(0, 1)."""
        return _exp(theta, 1.0, _WIDEST / 2).to(w.dtype)

    def slope(self, added: Tensor) -> Tensor:
        """d added / d theta."""
        return added

    def divergence(self, prior: Penalty, w: Tensor, theta: Tensor) -> tuple[Tensor | None, Tensor]:
        """The gradients of f(w^2 / sigma^2) / 2 in w and in theta."""
        in_w = _exp(theta, -2.0).mul_(w)
        in_w.mul_(prior.dual_slope((in_w * w).clamp_(1e-30, 1e30)))
        return in_w, (in_w * w).neg_()


def _exp(theta: Tensor, factor: float = 1.0, widest: float = _WIDEST) -> Tensor:
    """exp(factor * theta), cut off; in its own memory throughout, since a fresh tensor costs more than the arithmetic."""
    return (theta * factor).clamp_(-widest, widest).exp_()


class _Exp(torch.autograd.Function):
    """The same with its gradient in theta, in a pass each."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, factor: float) -> Tensor:
        ctx.factor, value = factor, map_chunks(lambda theta: _exp(theta, factor), theta)
        ctx.save_for_backward(value)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (value,) = ctx.saved_tensors
        return map_chunks(lambda grad, value: (grad * value).mul_(ctx.factor), grads[0], value), None
