"""Mask rules that rank the weights of a tensor by |w|: TopK and TargetedDropout. They are not separable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_sparse import _checks
from lightning_sparse.duality import Examples, MaskRule, Penalty


def topk_mask(w: Tensor, count: int) -> Tensor:
    """Return the boolean mask of the ``count`` largest |w|, plus every NaN. Ties: the first in memory order are selected."""
    return _topk(w.detach().abs().reshape(-1), count).reshape(w.shape)


def prune_smallest(
    weights: Mapping[str, Tensor], kept: Mapping[str, Tensor], share: float, ties: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Prune the boolean masks ``kept`` until round(share * n) of all n weights are pruned, and return the new masks.

    The smallest |w| over all tensors are pruned; of equal weights first those with the smallest ``ties``, then the last ones.
    Weights pruned before stay pruned and count towards the share. At least one weight remains.
    """
    sizes = [w.detach().abs().masked_fill(~kept[name], -1.0).reshape(-1) for name, w in weights.items()]
    if not sizes:
        return {}
    flat = torch.cat([size.to(sizes[0].device) for size in sizes])
    flat_ties = None if ties is None else torch.cat([ties[name].detach().to(sizes[0].device).reshape(-1) for name in weights])
    remaining = _topk(flat, max(1, len(flat) - round(share * len(flat))), flat_ties).split([len(size) for size in sizes])
    return {name: part.reshape(kept[name].shape).to(kept[name].device) & kept[name] for name, part in zip(weights, remaining, strict=True)}


def lamp(w: Tensor) -> Tensor:
    """Return the LAMP score of each weight of a parameter: w_j^2 divided by the sum of all w_i^2 >= w_j^2, 1 for the largest weight.

    Source: Lee et al., arXiv 2010.07611.
    """
    flat = w.detach().reshape(-1)
    (alive,) = flat.nonzero(as_tuple=True)  # zeros score 0, and need not be sorted
    square, order = flat[alive].float().square().sort(stable=True)
    larger = square.flip(0).cumsum(0).flip(0)
    score = flat.new_zeros(flat.shape, dtype=square.dtype)
    return score.index_copy_(0, alive[order], square / larger.clamp(min=torch.finfo(square.dtype).tiny)).reshape(w.shape)


def _topk(size: Tensor, count: int, ties: Tensor | None = None) -> Tensor:
    """Return the boolean mask of the ``count`` highest entries of a vector, plus every NaN.

    Ties: those with the highest ``ties`` are selected, then the first.
    """
    if count <= 0 or count >= len(size):
        return torch.full_like(size, count > 0, dtype=torch.bool)
    without_nan = size.nan_to_num(torch.inf, torch.inf)
    bound = without_nan.kthvalue(len(size) - count + 1).values
    above, tied = without_nan > bound, without_nan == bound
    remaining = count - above.sum()
    if ties is not None:
        tied = _topk(ties.masked_fill(~tied, -torch.inf), int(remaining)) & tied
    return above | (tied & (tied.cumsum(0) <= remaining)) | size.isnan()


@dataclass(frozen=True)
class TopK(MaskRule):
    """alpha = 1 on the k = round(density * numel) largest |w| (at least one), 0 on the others. Ties: the first are kept.

    The mask of iterative hard thresholding and of gradual magnitude pruning. The equivalent penalty is the indicator of
    "at most k non-zeros". Raises ValueError unless 0 < density <= 1.

    Args:
        density: the share of weights to keep.
    """

    density: float
    examples: ClassVar[Examples] = ({"density": 0.25},)
    separable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _checks.between("density", self.density, 0, 1, closed="r")

    def kept(self, w: Tensor) -> Tensor:
        """Return the boolean mask of the weights to keep."""
        return topk_mask(w, max(1, round(self.density * w.numel())))

    def keep_probability(self, w: Tensor) -> Tensor:
        return self.kept(w).to(w.dtype)

    def to_penalty(self) -> Penalty:
        return TopKPenalty(self.density)


@dataclass(frozen=True)
class TopKPenalty(Penalty):
    """The indicator of norm0(w) <= k, elementwise: 0 for the k largest |w| and for zeros, inf for other non-zero weights.

    eta_hat is inf for the k largest |w|, 0 for the others. dual(eta) is a scalar: 0 if at most k entries are > 0, else inf.
    The prox is the projection: it keeps the k largest |w|.
    """

    density: float
    examples: ClassVar[Examples] = TopK.examples
    separable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        TopK(self.density)

    def omega(self, w: Tensor) -> Tensor:
        return torch.zeros_like(w).masked_fill(~TopK(self.density).kept(w) & (w != 0), torch.inf)

    def eta_hat(self, w: Tensor) -> Tensor:
        return torch.zeros_like(w).masked_fill(TopK(self.density).kept(w), torch.inf)

    def dual(self, eta: Tensor) -> Tensor:
        k = max(1, round(self.density * eta.numel()))
        return eta.new_tensor(0.0 if int((eta > 0).sum()) <= k else torch.inf)

    def prox(self, w: Tensor, step: Tensor | float) -> Tensor:
        return w * TopK(self.density).keep_probability(w)


@dataclass(frozen=True)
class TargetedDropout(MaskRule):
    """alpha = 1 - rate on the round(fraction * numel) smallest |w|, 1 on the others. Ties: the first count as larger.

    The equivalent penalty is c/2 times the sum of w^2 over the smallest, c = rate / (1 - rate). No exact zeros, because
    alpha(0) > 0. Raises ValueError unless 0 < rate < 1 and 0 < fraction <= 1.

    Args:
        rate: the probability of dropping a weight among the smallest.
        fraction: the share of weights counted as the smallest.
    """

    rate: float
    fraction: float
    examples: ClassVar[Examples] = ({"rate": 0.5, "fraction": 0.75},)
    separable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _checks.between("rate", self.rate, 0, 1)
        _checks.between("fraction", self.fraction, 0, 1, closed="r")

    def targeted(self, w: Tensor) -> Tensor:
        """Return the boolean mask of the smallest weights, dropped with probability ``rate``."""
        return ~topk_mask(w, w.numel() - round(self.fraction * w.numel()))

    def keep_probability(self, w: Tensor) -> Tensor:
        return torch.ones_like(w).masked_fill(self.targeted(w), 1 - self.rate)

    def to_penalty(self) -> Penalty:
        return TargetedDropoutPenalty(self.rate, self.fraction)


@dataclass(frozen=True)
class TargetedDropoutPenalty(Penalty):
    """c w^2 / 2 for each of the m smallest |w|, 0 for the others, c = rate / (1 - rate). Omega is the sum.

    eta_hat is 1/c for the m smallest, inf for the others. dual(eta) is a scalar: 0 if
    sum_j min(c, 1 / eta_j) >= c m, else inf. The prox (one step size per tensor) divides the m smallest by 1 + c step.
    """

    rate: float
    fraction: float
    examples: ClassVar[Examples] = TargetedDropout.examples
    separable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        TargetedDropout(self.rate, self.fraction)

    @property
    def _cost(self) -> float:
        return self.rate / (1 - self.rate)

    def _targeted(self, w: Tensor) -> Tensor:
        return TargetedDropout(self.rate, self.fraction).targeted(w)

    def omega(self, w: Tensor) -> Tensor:
        return (self._cost / 2 * w * w).masked_fill(~self._targeted(w), 0.0)

    def eta_hat(self, w: Tensor) -> Tensor:
        return torch.full_like(w, 1 / self._cost).masked_fill(~self._targeted(w), torch.inf)

    def dual(self, eta: Tensor) -> Tensor:
        m = round(self.fraction * eta.numel())
        weight = (1 / eta.double()).clamp(max=self._cost).sum()
        rounding = 1 - 4 * torch.finfo(eta.dtype).eps
        return eta.new_tensor(0.0 if float(weight) >= self._cost * m * rounding else torch.inf)

    def prox(self, w: Tensor, step: Tensor | float) -> Tensor:
        return torch.where(self._targeted(w), w / (1 + self._cost * step), w)
