"""The mask's distribution given its keep probability alpha: E s = 1 and Var s = (1 - alpha) / alpha."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Noise(ABC):
    """Draws multiplicative masks s, same shape and dtype as alpha, independent of each other."""

    local: bool = False  # noise on a layer's output instead of on its weights

    @abstractmethod
    def sample(self, alpha: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A mask with E s = 1 and Var s = (1 - alpha) / alpha, zero where alpha is zero."""

    def pattern(self, alpha: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """What to keep of a draw until the backward pass, from which :meth:`mask` makes it again: here the mask itself."""
        return self.sample(alpha, generator)

    def mask(self, pattern: Tensor, alpha: Tensor) -> Tensor:
        """The mask of a :meth:`pattern` and the alpha that it was drawn with."""
        return pattern


@dataclass(frozen=True)
class ScaledBernoulli(Noise):
    """s = 1/alpha with probability alpha, else 0.

    On weights alone: noise on a layer's output would match only the moments of such a mask; Gaussian has ``local``.
    """

    def sample(self, alpha: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.mask(self.pattern(alpha, generator), alpha)

    def pattern(self, alpha: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Which weights are kept, one byte each."""
        wide = torch.promote_types(alpha.dtype, torch.float32)  # 16-bit draws have too few levels near 0
        return ~(torch.rand(alpha.shape, dtype=wide, device=alpha.device, generator=generator) >= alpha)  # NaN stays NaN

    def mask(self, pattern: Tensor, alpha: Tensor) -> Tensor:
        return pattern / torch.where(pattern, alpha, torch.ones_like(alpha))


@dataclass(frozen=True)
class Gaussian(Noise):
    """s ~ N(1, (1 - alpha) / alpha). ``local`` moves the noise to the outputs of Linear and ConvNd layers.

    A layer's output then has mean W x and variance (W^2 (1 - alpha) / alpha) x^2: the same law per sample for a
    Linear layer, far less gradient noise; in a convolution the positions' noise becomes independent.
    """

    local: bool = False

    def sample(self, alpha: Tensor, generator: torch.Generator | None = None) -> Tensor:
        draw = torch.empty_like(alpha).normal_(generator=generator)
        mask = 1 + draw * variance(alpha).sqrt()
        return mask.masked_fill(alpha == 0, 0.0)


def variance(alpha: Tensor) -> Tensor:
    """Var s = (1 - alpha) / alpha: 0 at alpha = 1, inf at alpha = 0."""
    return (1 - alpha) / alpha


def output_noise(layer: Any, x: Tensor, spread: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Noise of variance (W^2 * spread)(x^2) for the output of a Linear or ConvNd ``layer`` with input ``x``.

    ``spread`` is Var s of each weight's mask; the gradient flows through W, x and, where it asks for one, ``spread``.
    """
    return additive_output_noise(layer, x, layer.weight * layer.weight * spread, generator)


def additive_output_noise(layer: Any, x: Tensor, weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Noise of variance ``weight`` (x^2) for the output of a Linear or ConvNd ``layer``: its weights have those variances."""
    square = functional.linear(x * x, weight) if isinstance(layer, nn.Linear) else layer._conv_forward(x * x, weight, None)
    draw = torch.empty_like(square).normal_(generator=generator)
    return draw * square.clamp(min=1e-16).sqrt()  # the root's slope is infinite at 0


def stream(device: torch.device, *key: int) -> torch.Generator:
    """A generator of its own for each ``key``: the same draws whenever and wherever that key comes up again."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") % 2**63)
