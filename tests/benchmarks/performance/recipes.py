"""Recipes that train LeNet-300-100 to a share of zeros in a given number of epochs: ours, gradual pruning, and peers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelPruning
from torch import nn
from torch.nn.utils import prune

from lightning_sparse.callbacks import AdaptiveProx, MagnitudePruning, ReweightedPenalty, VariationalDropout
from lightning_sparse.schedules import Cubic
from performance.arms import PENALTY
from performance.peers_masks import weights_of
from performance.peers_penalties import add_to_loss, log_sum, wrap

SHARE = 0.98  # of the weights, zero at the end
Prepare = Callable[[LightningModule, int], list[Callback]]  # changes a fresh module where a recipe must; epochs of the run


@dataclass(frozen=True)
class Recipe:
    """A recipe: ``method`` is compared, ``variant`` is one of the settings tuned for it."""

    method: str
    variant: str
    prepare: Prepare
    package: str = "torch"


_FREEZES = (0.25, 0.5)  # the share of the run that is fine-tuned
_WINDOWS = ((0.0, 0.5), (0.1, 0.6), (0.0, 0.75))  # of a pruning ramp, as shares of the run


def ours() -> list[Recipe]:
    """Return recipes of callbacks with target_sparsity."""
    common = {"target_sparsity": SHARE}
    forms: dict[str, Callable[[float], Callback]] = {
        "ReweightedPenalty": lambda freeze: ReweightedPenalty(PENALTY, freeze=freeze, **common),
        "AdaptiveProx": lambda freeze: AdaptiveProx(PENALTY, freeze=freeze, **common),
        "VariationalDropout": lambda freeze: VariationalDropout(prior="empirical_bayes", freeze=freeze, **common),
    }
    return [
        Recipe(name, f"freeze {freeze:g}", lambda module, epochs, make=make, freeze=freeze: [make(freeze)])
        for name, make in forms.items()
        for freeze in _FREEZES
    ]


def gradual() -> list[Recipe]:
    """Return recipes of this package's global gradual magnitude pruning."""
    return [
        Recipe("MagnitudePruning", _ramp(*window), lambda module, epochs, window=window: [MagnitudePruning(SHARE, *window)])
        for window in _WINDOWS
    ]


def _ramp(begin: float, end: float) -> str:
    return f"ramp {begin:g} to {end:g}"


def model_pruning() -> list[Recipe]:
    """Return recipes of Lightning's global pruning: along the same ramps at the end of epochs, or once at half-time, then fine-tuning."""
    ramps = [
        Recipe("ModelPruning", _ramp(*window), lambda module, epochs, window=window: [_pruner(module, amounts(epochs, *window))])
        for window in _WINDOWS
    ]
    return [*ramps, Recipe("ModelPruning", "at once, at 0.5", lambda module, epochs: [_pruner(module, at_once(epochs))])]


def amounts(epochs: int, begin: float, end: float) -> list[float]:
    """Return the share of remaining weights to prune at the end of each epoch, so that zeros follow the cubic ramp."""
    ramp = Cubic(SHARE, begin, end)
    wanted = [0.0, *(ramp(epoch + 1, epochs) for epoch in range(epochs))]
    return [(after - before) / (1 - before) for before, after in itertools.pairwise(wanted)]


def at_once(epochs: int) -> list[float]:
    """Return the amounts for pruning once in the middle."""
    return [SHARE if epoch + 1 == max(1, epochs // 2) else 0.0 for epoch in range(epochs)]


def _pruner(module: LightningModule, shares: list[float]) -> ModelPruning:
    kept = {"use_lottery_ticket_hypothesis": False, "amount": lambda epoch: shares[epoch]}
    return ModelPruning("l1_unstructured", weights_of(module), **kept)  # type: ignore[arg-type]


def prune_optimizer() -> list[Recipe]:
    """Return recipes of torchao's global constraint with a cubic ramp, then fine-tuning with frozen zeros."""
    return [Recipe("PruneOptimizer", _ramp(*window), _prune_optimizer(*window), "torchao") for window in _WINDOWS]


def _prune_optimizer(begin: float, end: float) -> Prepare:
    group = {"prox_type": "GlobalMinSparsityConstraint", "group_type": "KElementGrouper", "k": 1, "prox_freq": 100}
    group |= {"min_sparsity": SHARE, "min_sparsity_schedule": True}

    def prepare(module: LightningModule, epochs: int) -> list[Callback]:
        wrap(module, group, lambda steps: {"warmup_steps": round(begin * steps), "healing_start_step": round(end * steps)})
        return []

    return prepare


def loss_term() -> list[Recipe]:
    """Return recipes with a log-sum penalty in the loss, a cut of the smallest weights at three quarters, then fine-tuning."""
    return [Recipe("loss term and threshold", f"lam {lam:g}", _loss_term(lam)) for lam in (3e-4, 1e-3)]


def _loss_term(lam: float) -> Prepare:
    def prepare(module: LightningModule, epochs: int) -> list[Callback]:
        cut, weights = Cut(epochs), [layer.weight for layer, _ in weights_of(module)]
        add_to_loss(module, lambda: cut.strength * lam * log_sum(weights))
        return [cut]

    return prepare


class Cut(Callback):
    """At three quarters of the epochs, end the penalty (``strength`` from 1 to 0) and prune with torch's pruning."""

    def __init__(self, epochs: int) -> None:
        self.at, self.strength = max(1, round(0.75 * epochs)), 1.0

    def on_train_epoch_end(self, trainer: object, pl_module: LightningModule) -> None:
        if pl_module.current_epoch + 1 == self.at:
            self.strength = 0.0
            layers: list[tuple[nn.Module, str]] = weights_of(pl_module)
            prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=SHARE)  # type: ignore[no-untyped-call]


RECIPES = (*ours(), *gradual(), *model_pruning(), *prune_optimizer(), *loss_term())
METHODS = tuple(dict.fromkeys(recipe.method for recipe in RECIPES))
