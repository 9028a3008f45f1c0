"""Scores that rank weights: the lowest are removed first. For the cut towards a target, and for pruning.

A score of your own is one class: a subclass of :class:`Score` with ``of``. In a recipe: ``class_path: my_file.MyScore``.
``lightning_sparse.testing.check_score`` checks it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_sparse import _checks
from lightning_sparse._construction import Constructed, typed
from lightning_sparse.mask_rules.ranked import lamp, prune_smallest

__all__ = [
    "LAMP",
    "Fisher",
    "KeepProbability",
    "LayerMagnitude",
    "Magnitude",
    "Ranked",
    "RelativeMagnitude",
    "Score",
    "keep_highest",
]


@dataclass(frozen=True)
class Ranked:
    """What is known of one parameter's weights, or of its groups, when they are ranked. All tensors have the same shape.

    Args:
        name: the parameter's name, or that of the groups.
        w: the weights, as the method uses them: alpha times the live weights; of groups their sizes.
        alive: False where a weight is zero already. Its score does not matter, because it goes first.
        alpha: the keep probabilities of the method; 1 for pruning.
        squares: running mean of the squared gradients of the loss in w; None unless the score ``needs_squares``.
    """

    name: str
    w: Tensor
    alive: Tensor
    alpha: Tensor
    squares: Tensor | None = None


class Score(metaclass=Constructed):
    """Ranks weights over all parameters: those of the lowest score are removed first."""

    needs_squares: ClassVar[bool] = False  # ranks by Ranked.squares, which are measured in every optimiser step
    is_loss: ClassVar[bool] = False  # estimates a rise in loss: groups are ranked by the score for each weight that goes with them

    def __repr__(self) -> str:
        return typed(self)

    @abstractmethod
    def of(self, given: Ranked) -> Tensor:
        """Return the scores of one parameter's weights, finite, >= 0 and of the parameter's shape."""


def check(score: Score, given: Ranked, found: object) -> None:
    """Raise TypeError or ValueError, naming the score and the parameter, unless ``found`` is a tensor that :meth:`Score.of` may return."""
    of, shape = f"the score {score!r} of {given.name!r}", tuple(given.w.shape)
    if not isinstance(found, Tensor) or not found.is_floating_point():
        kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(f"{of} is {kind}: return a floating tensor of given.w's shape {shape}")
    if found.shape != given.w.shape:
        raise ValueError(f"{of} has the shape {tuple(found.shape)}: return one score for each weight, in given.w's shape {shape}")
    if bad := int((~found.isfinite()).sum()):
        raise ValueError(f"{of} is NaN or infinite at {bad} of {found.numel()} weights; divide by nothing that may be 0")
    below = (found < 0) & given.alive
    if bad := int(below.sum()):
        least = float(found[below].min())
        raise ValueError(
            f"{of} is negative at {bad} of {found.numel()} weights, down to {least:.3g}: scores must be >= 0, and the lowest are removed "
            "first. Take the absolute value, or subtract the smallest value"
        )


def missing_squares(given: Ranked, error: Exception) -> str:
    """Return the cure for an ``error`` of a score that uses squares without ``needs_squares``; empty for another error.

    Squares are not None here where the class sets it: weights are ranked by their magnitude until gradients have been measured.
    """
    if given.squares is not None or "None" not in str(error):
        return ""
    return "given.squares is None unless the class sets needs_squares = True"


def checked(score: Score, given: Ranked, known: set[str]) -> Tensor:
    """Return the scores of one parameter's weights; those of a parameter that is not ``known`` yet are checked, and it is added."""
    try:
        found = score.of(given)
    except Exception as error:  # a score of one's own may raise any error
        if lacks := missing_squares(given, error):
            raise ValueError(f"{score!r}: {type(error).__name__}: {error}; {lacks}") from error
        raise
    if given.name not in known:
        check(score, given, found)
        known.add(given.name)
    return found


@dataclass(frozen=True, repr=False)
class Magnitude(Score):
    """Scores |w|, over all layers."""

    def of(self, given: Ranked) -> Tensor:
        return given.w.abs()


@dataclass(frozen=True, repr=False)
class LayerMagnitude(Score):
    """Scores the share of the parameter's weights that are smaller, in [0, 1): every layer gets the same sparsity."""

    def of(self, given: Ranked) -> Tensor:
        size = given.w.abs().reshape(-1)
        places = torch.arange(len(size), dtype=torch.float32, device=size.device) / max(len(size), 1)
        return torch.empty_like(places).scatter_(0, size.argsort(stable=True), places).reshape(given.w.shape)


@dataclass(frozen=True, repr=False)
class LAMP(Score):
    """Scores w_j^2 / (sum of the w_k^2 >= w_j^2 in the parameter): 1 for its largest weight, so that no layer is emptied.

    Source: Lee et al., arXiv 2010.07611.
    """

    def of(self, given: Ranked) -> Tensor:
        return lamp(given.w)


@dataclass(frozen=True, repr=False)
class RelativeMagnitude(Score):
    """Scores |w| / (root mean square of the parameter's weights that are not zero)."""

    def of(self, given: Ranked) -> Tensor:
        count = given.alive.sum().clamp(min=1)
        rms = (given.w.float().square().masked_fill(~given.alive, 0.0).sum() / count).sqrt()
        return given.w.abs() / rms.clamp(min=torch.finfo(torch.float32).tiny)


@dataclass(frozen=True, repr=False)
class Fisher(Score):
    """Scores w^2 H, with H the running mean of the squared gradients: the rise in loss (optimal brain damage, times 2 and batch size).

    H costs one number a weight. It is measured at the gradients of the loss, before penalties are added and gradients clipped. The
    score of a group is F_g = E (sum_j w_j g_j)^2, which is r_g^2 H with H of the gradient in its size r_g, divided by the weights that go
    with it (``structure.Channels(cost="multiply_adds")``: by their multiply-adds).
    Sources: LeCun, Denker, Solla, NeurIPS 1989; of groups Molchanov et al., arXiv 1906.10771. Raises ValueError unless 0 <= decay < 1.

    Args:
        decay: the weight of the past in the running mean, for each optimiser step.
    """

    decay: float = 0.99
    needs_squares: ClassVar[bool] = True
    is_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.between("decay", self.decay, 0, 1, closed="l")

    def of(self, given: Ranked) -> Tensor:
        return given.w.square() if given.squares is None else given.w.square() * given.squares


@dataclass(frozen=True, repr=False)
class KeepProbability(Score):
    """Scores alpha, the method's own keep probability; |w| where it is 1 for all, as in pruning."""

    def of(self, given: Ranked) -> Tensor:
        return given.w.abs() if bool((given.alpha == 1).all()) else given.alpha


def check_weights(score: Score, values: Mapping[str, Tensor]) -> None:
    """Raise TypeError or ValueError, before training, unless a score of one's own fits these weights or sizes of groups.

    Squares of gradients, which are unknown then, are 1 + w^2. Tensors of zeros are left out, because they are not ranked so.
    """
    if type(score).__module__ == Score.__module__:
        return
    for name, w in values.items():
        if bool((w != 0).any()):
            squares = 1 + w.square() if score.needs_squares else None
            checked(score, Ranked(name, w, w != 0, torch.ones_like(w), squares), set())


def keep_highest(
    scores: Mapping[str, Tensor],
    alive: Mapping[str, Tensor],
    zeros: float,
    least: float = 0.0,
    left: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the boolean masks that leave round(zeros * n) of all n weights zero.

    Weights that are not ``alive`` go first, then those of the lowest score; of equal ones the last. In each tensor at least one weight
    remains that is alive, and at least the share ``least`` of its weights, as far as they are ``left`` and the number of zeros allows
    it; without ``left`` those are the weights that are alive.
    """
    everywhere = {name: torch.ones_like(where) for name, where in alive.items()}
    counted = {name: where.float() for name, where in alive.items()}  # those alive rank above the others
    if sum(where.numel() for where in alive.values()) == 0:
        return everywhere
    kept = prune_smallest(counted, everywhere, zeros, {name: scores[name].float() for name in alive})
    left = alive if left is None else left
    floors = {
        name: max(min(1, int(where.sum())), min(fewest(least, where.numel()), int(left[name].sum()))) for name, where in alive.items()
    }
    short = [name for name, floor in floors.items() if int(kept[name].sum()) < floor]
    while short:
        for name in short:
            counted[name] = counted[name] + 2 * _highest(scores[name], alive[name], left[name], floors[name])
        kept = prune_smallest(counted, everywhere, zeros, {name: scores[name].float() for name in alive})
        again = [name for name, floor in floors.items() if int(kept[name].sum()) < floor and name not in short]
        short = again if sum(floors.values()) <= sum(int(where.sum()) for where in kept.values()) else []
    return kept


def fewest(least: float, count: int) -> int:
    """Return the smallest number of ``count`` weights that is at least the share ``least`` of them."""
    return math.ceil(least * count - 1e-9)


def _highest(score: Tensor, alive: Tensor, left: Tensor, count: int) -> Tensor:
    """Return 1 at the ``count`` highest scores, of the weights that are alive first and then of those that are left, 0 elsewhere."""
    order = score.float().reshape(-1).argsort(descending=True, stable=True)
    tier = (left.float() + 2 * alive.float()).reshape(-1)[order]
    order = order[tier.argsort(descending=True, stable=True)[:count]]
    return torch.zeros(score.numel(), device=score.device).index_fill_(0, order, 1.0).reshape(score.shape)
