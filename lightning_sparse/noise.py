"""The mask's distribution given its keep probability alpha: E s = 1 and Var s = (1 - alpha) / alpha."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from numpy.random import SFC64
from torch import Tensor, nn
from torch.nn import functional

from lightning_sparse._pieces import mapped, over


class Noise(ABC):
    """Draws multiplicative masks s, same shape and dtype as alpha, independent of each other."""

    local: bool = False  # noise on a layer's output instead of on its weights

    @abstractmethod
    def sample(self, alpha: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A mask with E s = 1 and Var s = (1 - alpha) / alpha, zero where alpha is zero."""


@dataclass(frozen=True)
class ScaledBernoulli(Noise):
    """s = 1/alpha with probability alpha, else 0.

    On weights alone: noise on a layer's output would match only the moments of such a mask; Gaussian has ``local``.
    """

    def sample(self, alpha: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return mapped(_scaled_bernoulli, alpha, words(alpha.numel(), alpha.device, generator).view(alpha.shape))


_LEVELS = 65536  # keep probabilities are drawn in steps of 1 / 65536; the mask divides by the one drawn with, so its mean is 1


def _scaled_bernoulli(alpha: Tensor, draw: Tensor) -> Tensor:
    """1/alpha where the word ``draw`` is among the alpha * _LEVELS lowest, else 0; by arithmetic, since a select costs far more."""
    wide = alpha.to(torch.promote_types(alpha.dtype, torch.float32))
    levels = (wide * _LEVELS).ceil_()  # at least one where alpha is not 0
    kept = (levels - draw.to(levels.dtype)).clamp_(0, 1)  # whole numbers, so 1 or 0; NaN stays NaN
    return torch.addcdiv(levels.new_zeros(()), kept, levels.clamp_(min=1), value=_LEVELS).to(alpha.dtype)


def words(count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Random uint16, each of the 65,536 with equal chance: a quarter of a 64-bit draw, which costs far less than a float does."""
    size = -(-count // 4)
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator).view(torch.uint16)[:count]
    seed = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
    return torch.from_numpy(SFC64(seed).random_raw(size).view("uint16"))[:count]


@dataclass(frozen=True)
class Gaussian(Noise):
    """s ~ N(1, (1 - alpha) / alpha). ``local`` moves the noise to the outputs of Linear and ConvNd layers.

    A layer's output then has mean W x and variance (W^2 (1 - alpha) / alpha) x^2: the same law per sample for a
    Linear layer, far less gradient noise; in a convolution the positions' noise becomes independent.
    """

    local: bool = False

    def sample(self, alpha: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return mapped(_gaussian, alpha, normal_like(alpha, generator))


def _gaussian(alpha: Tensor, draw: Tensor) -> Tensor:
    return (1 + draw * variance(alpha).sqrt_()).masked_fill_(alpha == 0, 0.0)


def variance(alpha: Tensor) -> Tensor:
    """Var s = (1 - alpha) / alpha: 0 at alpha = 1, inf at alpha = 0."""
    return (1 - alpha) / alpha


def bounded_variance(eta: Tensor, lam: float, alpha_min: float) -> Tensor:
    """Var s = lam / eta of the keep probability 1 / (1 + lam / eta), and at most that of ``alpha_min``."""
    return over(lam, eta).clamp_(max=1 / alpha_min - 1) if lam > 0 else torch.zeros_like(eta)


def output_noise(layer: Any, x: Tensor, spread: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Noise of variance (W^2 * spread)(x^2) for the output of a Linear or ConvNd ``layer`` with input ``x``.

    ``spread`` is Var s of each weight's mask; the gradient flows through W, x and, where it asks for one, ``spread``.
    """
    return additive_output_noise(layer, x, _Spread.apply(layer.weight, spread), generator)


class _Spread(torch.autograd.Function):
    """w^2 times ``spread``, and its gradients."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, spread: Tensor) -> Tensor:
        ctx.save_for_backward(w, spread)
        return mapped(lambda w, spread: (w * w).mul_(spread), w, spread)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        w, spread = ctx.saved_tensors
        in_spread = mapped(lambda w, grad: (w * w).mul_(grad), w, grads[0]) if ctx.needs_input_grad[1] else None
        return mapped(lambda w, spread, grad: torch.addcmul(w.new_zeros(()), w * spread, grad, value=2), w, spread, grads[0]), in_spread


def additive_output_noise(layer: Any, x: Tensor, weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Noise of variance ``weight`` (x^2) for the output of a Linear or ConvNd ``layer``: its weights have those variances."""
    square = _Square.apply(x)
    total = functional.linear(square, weight) if isinstance(layer, nn.Linear) else layer._conv_forward(square, weight, None)
    return _Deviation.apply(total, normal_like(total, generator))  # type: ignore[no-any-return]


class _Square(torch.autograd.Function):
    """x^2, whose gradient takes one pass; autograd's own of a product takes three."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.addcmul(x.new_zeros(()), x, grads[0], value=2)


_LEAST = 1e-16  # a variance of at most that makes no noise: the root's slope is infinite at 0


class _Deviation(torch.autograd.Function):
    """draw * sqrt(variance), and its gradient in the variance: draw / (2 sqrt(variance)), which the forward has made but for the half."""

    @staticmethod
    def forward(ctx: Any, variance: Tensor, draw: Tensor) -> Tensor:
        slope = _inverse_root(variance).mul_(draw)
        ctx.save_for_backward(variance, slope)
        return slope * variance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        variance, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated once more: the slope as a function of the variance
            slope = slope * variance.detach().sqrt() * _inverse_root(variance)
        return torch.addcmul(slope.new_zeros(()), slope, grads[0], value=0.5), None


def _inverse_root(variance: Tensor) -> Tensor:
    return functional.threshold(variance, _LEAST, torch.inf).rsqrt()


def normal_like(tensor: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """N(0, 1) in the shape of ``tensor`` and in its order in memory: torch draws in any other order at a fraction of the speed."""
    usual = tensor.is_contiguous() or type(tensor) not in (Tensor, nn.Parameter)
    if usual or not torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return torch.empty_like(tensor).normal_(generator=generator)
    drawn = torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device).normal_(generator=generator)
    return drawn.as_strided(tensor.shape, tensor.stride())


def stream(device: torch.device, *key: int) -> torch.Generator:
    """A generator of its own for each ``key``: the same draws whenever and wherever that key comes up again."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") % 2**63)
