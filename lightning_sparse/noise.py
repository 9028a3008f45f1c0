"""Noise: the mask's distribution given its keep probability alpha (E s = 1 and Var s = (1 - alpha) / alpha), on weights or on outputs.

Learned noise: a weight w has the noise variance w^2 / eta; the divergence from a prior is f(eta) / 2.
Source: Molchanov, Ashukha, Vetrov, "Variational Dropout Sparsifies Deep Neural Networks", arXiv 1701.05369.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from numpy.random import SFC64
from torch import Tensor, nn
from torch.nn import functional

from lightning_sparse import _checks
from lightning_sparse._construction import Constructed, typed
from lightning_sparse.duality import Penalty
from lightning_sparse.elementwise import map_chunks, scalar_div


class Noise(metaclass=Constructed):
    """Draws multiplicative masks s, same shape and dtype as alpha, independent of each other."""

    local: bool = False  # noise on a layer's output instead of on its weights
    share: float | None = 1.0  # of a batch's samples that noise on outputs is made for; None leaves it to the method

    def __repr__(self) -> str:
        return typed(self)

    @abstractmethod
    def sample(self, alpha: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A mask with E s = 1 and Var s = (1 - alpha) / alpha, zero where alpha is zero."""


class Elementwise(Noise):
    """A mask made of a random number for each weight."""

    from_words: ClassVar[bool] = False  # the numbers are whole, each of the 65,536 from 0 on with equal chance

    @abstractmethod
    def numbers(self, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The random numbers of a mask that is like ``like``, in its shape."""

    @abstractmethod
    def mask(self, alpha: Tensor, numbers: Tensor) -> Tensor:
        """The mask that they make of keep probabilities, element by element; in any type that holds them."""

    def sample(self, alpha: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return map_chunks(self.mask, alpha, self.numbers(alpha, generator))


@dataclass(frozen=True)
class ScaledBernoulli(Elementwise):
    """s = 1/alpha with probability alpha, else 0.

    On weights alone: noise on a layer's output would match only the moments of such a mask; Gaussian has ``local``.
    """

    from_words = True

    def numbers(self, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return in_order(random_words(like.numel(), like.device, generator), like)

    def mask(self, alpha: Tensor, numbers: Tensor) -> Tensor:
        return _scaled_bernoulli(alpha, numbers)


_LEVELS = 65536  # keep probabilities are drawn in steps of 1 / 65536; the mask divides by the one drawn with, so its mean is 1


def _scaled_bernoulli(alpha: Tensor, draw: Tensor) -> Tensor:
    """1/alpha where the word ``draw`` is among the alpha * _LEVELS lowest, else 0; by arithmetic, since a select costs far more."""
    wide = alpha.to(torch.promote_types(alpha.dtype, torch.float32))
    levels = (wide * _LEVELS).ceil_()  # at least one where alpha is not 0
    kept = (levels - draw.to(levels.dtype)).clamp_(0, 1)  # whole numbers, so 1 or 0; NaN stays NaN
    return torch.addcdiv(levels.new_zeros(()), kept, levels.clamp_(min=1), value=_LEVELS).to(alpha.dtype)


@dataclass(frozen=True)
class Gaussian(Elementwise):
    """s ~ N(1, (1 - alpha) / alpha), on the weights or on the outputs of Linear and ConvNd layers.

    With local noise a layer's output has mean W x and variance (W^2 (1 - alpha) / alpha) x^2: the same law per sample for a
    Linear layer, far less gradient noise; in a convolution the positions' noise becomes independent.

    Noise on outputs costs a product of matrices beside each of a layer's. With ``share`` < 1 it is made for that share of a
    batch's samples (dimension 0), others in each layer and batch, with 1 / share times the variance: a mask that is 1 with
    probability 1 - share, of the same mean and variance. Raises ValueError unless 0 < share <= 1, or without ``local``.

    Args:
        local: move the noise to the outputs of Linear and ConvNd layers.
        share: the share of a batch's samples that noise on outputs is made for. None is 0.25 where AdaptiveMask bounds the noise
            and lets it fade, as by default, and 1 elsewhere.
    """

    local: bool = False
    share: float | None = None

    def __post_init__(self) -> None:
        if self.share is not None and _checks.between("share", self.share, 0, 1, closed="r") < 1 and not self.local:
            raise ValueError(f"share={self.share:g} is a share of the samples, whose outputs get noise: it needs local=True")

    def numbers(self, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return normal_like(like, generator)

    def mask(self, alpha: Tensor, numbers: Tensor) -> Tensor:
        return (1 + numbers * variance(alpha).sqrt_()).masked_fill_(alpha == 0, 0.0)


def variance(alpha: Tensor) -> Tensor:
    """Var s = (1 - alpha) / alpha: 0 at alpha = 1, inf at alpha = 0."""
    return (1 - alpha) / alpha


def kept(variance: Tensor) -> Tensor:
    """The keep probability of a mask of that variance, 1 / (1 + Var s), in its memory: the inverse of :func:`variance`."""
    return variance.add_(1).reciprocal_()


def bounded_variance(eta: Tensor, lam: float | Tensor, alpha_min: float) -> Tensor:
    """Var s = lam / eta, ``lam`` > 0, of the keep probability 1 / (1 + lam / eta), and at most that of ``alpha_min``."""
    return scalar_div(lam, eta).clamp_(max=1 / alpha_min - 1)


# -- noise on outputs ------------------------------------------------------------------------------------------------------


def output_noise(layer: Any, x: Tensor, spread: Tensor, generator: torch.Generator | None = None, share: float = 1.0) -> Tensor:
    """Noise of variance (W^2 * spread)(x^2) for the output of a Linear or ConvNd ``layer`` with input ``x``.

    ``spread`` is Var s of each weight's mask; the gradient flows through W, x and, where it asks for one, ``spread``. Of a
    batch the noise is for a ``share`` of the samples, as much more.
    """
    noise = partial(additive_output_noise, layer, weight=_Spread.apply(layer.weight, spread), generator=generator)
    return noise(x) if share == 1 or x.dim() < layer.weight.dim() else for_sample_fraction(noise, x, share, generator)


class _Spread(torch.autograd.Function):
    """w^2 times ``spread``, and its gradients."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, spread: Tensor) -> Tensor:
        ctx.save_for_backward(w, spread)
        return map_chunks(lambda w, spread: (w * w).mul_(spread), w, spread)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        w, spread = ctx.saved_tensors
        in_spread = map_chunks(lambda w, grad: (w * w).mul_(grad), w, grads[0]) if ctx.needs_input_grad[1] else None
        return map_chunks(lambda w, spread, grad: torch.addcmul(w.new_zeros(()), w * spread, grad, value=2), w, spread, grads[0]), in_spread


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


def for_sample_fraction(noise: Callable[[Tensor], Tensor], x: Tensor, share: float, generator: torch.Generator | None = None) -> Tensor:
    """Make ``noise`` for about ``share`` of the samples of ``x`` (dimension 0), times sqrt(samples / taken); 0 for the others.

    The samples are a contiguous block, with wrap-around, that starts at a random index: each is equally likely. Mean and variance
    are those of noise on all samples, at ``share`` of the cost.
    """
    count, taken = len(x), max(1, round(share * len(x)))
    if taken >= count:
        return noise(x)
    start = int(torch.randint(count, (), generator=generator, device="cpu" if generator is None else generator.device))
    wrapped = max(0, start + taken - count)  # samples of the block that stand at the beginning
    part = x.narrow(0, start, taken) if not wrapped else torch.cat([x.narrow(0, start, taken - wrapped), x.narrow(0, 0, wrapped)])
    found = noise(part) * (count / taken) ** 0.5
    front = 0 if wrapped else start
    placed = functional.pad(found, [0, 0] * (found.dim() - 1) + [front, count - taken - front])
    return placed.roll(start, 0) if wrapped else placed


# -- learned noise ---------------------------------------------------------------------------------------------------------

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
        return output_noise(layer, x, _Exp.apply(theta, -1.0), generator)

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
        return additive_output_noise(layer, x, _Exp.apply(theta, 2.0), generator)

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


# -- random numbers --------------------------------------------------------------------------------------------------------


def generator_for(device: torch.device, *key: int) -> torch.Generator:
    """Return a generator seeded by ``key``: equal keys give equal draws."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") % 2**63)


def random_words(count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Draw ``count`` uniform uint16 numbers: four from each 64-bit draw, which costs far less than floats do."""
    size = -(-count // 4)
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator).view(torch.uint16)[:count]
    seed = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
    return torch.from_numpy(SFC64(seed).random_raw(size).view("uint16"))[:count]


def normal_like(tensor: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw N(0, 1) numbers in the shape and memory order of ``tensor``, because torch draws in any other order far more slowly."""
    if _is_row_major(tensor):
        return torch.empty_like(tensor).normal_(generator=generator)
    return in_order(torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device).normal_(generator=generator), tensor)


def in_order(flat: Tensor, like: Tensor) -> Tensor:
    """View ``flat`` in the shape and memory order of ``like``, so that both can be cut into chunks."""
    return flat.view(like.shape) if _is_row_major(like) else flat.as_strided(like.shape, like.stride())


def _is_row_major(tensor: Tensor) -> bool:
    """Return True for a row-major tensor, and for tensors without an order that could be followed."""
    if tensor.is_contiguous() or type(tensor) not in (Tensor, nn.Parameter):
        return True
    return not torch.ops.aten.is_non_overlapping_and_dense(tensor)
