"""What the conformance suite is run on: every callback of the package, and what others have, for comparison."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelPruning
from torch.nn import Parameter

from lightning_sparse import noise, penalties
from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, ReweightedPenalty
from lightning_sparse.conformance import Subject

LOG_SUM = penalties.LogSum(eps=2.0)


def penalty() -> list[Callback]:
    return [ReweightedPenalty(LOG_SUM, 0.5)]


def prox() -> list[Callback]:
    return [AdaptiveProx(LOG_SUM, 0.2)]


def exact_prox() -> list[Callback]:
    return [AdaptiveProx(LOG_SUM, 0.2, exact=True)]


def mask() -> list[Callback]:
    return [AdaptiveMask(LOG_SUM, 0.5)]


def bernoulli() -> list[Callback]:
    return [AdaptiveMask(LOG_SUM, 0.5, noise=noise.ScaledBernoulli())]


def frozen() -> list[Callback]:
    return [ReweightedPenalty(LOG_SUM, 0.5, freeze=0.5)]


def model_pruning() -> list[Callback]:
    return [ModelPruning("l1_unstructured", amount=0.5)]


def prune_optimizer(parameters: Iterable[Parameter]) -> torch.optim.Optimizer:
    """torchao's proximal optimiser around Adam, with a lasso on the matrices."""
    from torchao.prototype.pat.optim import PruneOptimizer

    given = [*parameters]
    matrices: dict[str, Any] = {"params": [p for p in given if p.dim() > 1], "prox_type": "ProxLasso", "group_type": "ElemGrouper"}
    others = {"params": [p for p in given if p.dim() <= 1]}
    base = torch.optim.Adam([matrices | {"reg_lambda": 0.5}, *([others] if others["params"] else [])], 1e-2)
    wrapped: torch.optim.Optimizer = PruneOptimizer(base)
    return wrapped


OURS = {
    "ReweightedPenalty": Subject("ReweightedPenalty", penalty),
    "AdaptiveProx": Subject("AdaptiveProx", prox),
    "AdaptiveMask": Subject("AdaptiveMask", mask),
    "AdaptiveMask, Bernoulli": Subject("AdaptiveMask, Bernoulli", bernoulli),
}
VARIANTS = {
    "ReweightedPenalty, frozen": Subject("ReweightedPenalty, frozen", frozen),
    "AdaptiveProx, exact": Subject("AdaptiveProx, exact", exact_prox),
}
OTHERS = {
    "ModelPruning": Subject("ModelPruning", model_pruning),
    "PruneOptimizer": Subject("PruneOptimizer", tuple, prune_optimizer),
}
