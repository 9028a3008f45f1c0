"""Subjects of the conformance suite: every callback of the package, and tools of other packages for comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelPruning
from torch.nn import Parameter

from lightning_sparse import noise, penalties
from lightning_sparse.callbacks import (
    AdaptiveMask,
    AdaptiveProx,
    EtaTrick,
    HardConcrete,
    MagnitudePruning,
    PenaltyLoss,
    ReweightedPenalty,
    Sparsify,
    VariationalDropout,
)
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
    return [AdaptiveMask(LOG_SUM, 0.2, noise=noise.ScaledBernoulli())]  # because at 0.5 some draws prune all weights


def frozen() -> list[Callback]:
    return [ReweightedPenalty(LOG_SUM, 0.5, freeze=0.5)]


def loss() -> list[Callback]:
    return [PenaltyLoss(LOG_SUM, 0.5)]


def joint() -> list[Callback]:
    return [EtaTrick(LOG_SUM, 0.3, tol=0.3, learned_lr=0.4, keep_start=0.303)]


def additive_noise() -> list[Callback]:
    return [VariationalDropout(0.02, "empirical_bayes", log_start=-1.0, learned_lr=0.05)]


def weight_noise() -> list[Callback]:
    return [VariationalDropout(0.1, noise="weight", log_start=2.93, learned_lr=0.3)]


def local_noise() -> list[Callback]:
    return [VariationalDropout(0.1, "molchanov", noise="local", log_start=2.94, learned_lr=0.3)]


def gates() -> list[Callback]:
    return [HardConcrete(0.03, tol=0.5, log_start=-0.578, learned_lr=0.3)]


def compiled_penalty() -> list[Callback]:
    return [ReweightedPenalty(LOG_SUM, 0.5, compile=True)]


def compiled_prox() -> list[Callback]:
    return [AdaptiveProx(LOG_SUM, 0.2, compile=True)]


def compiled_mask() -> list[Callback]:
    return [AdaptiveMask(LOG_SUM, 0.5, compile=True)]


def compiled_bernoulli() -> list[Callback]:
    return [AdaptiveMask(LOG_SUM, 0.2, noise=noise.ScaledBernoulli(), compile=True)]


def pruning() -> list[Callback]:
    return [MagnitudePruning(0.5, every=2)]


def pruning_by_layer() -> list[Callback]:
    return [MagnitudePruning(0.5, begin=0.1, end=0.6, every=3, scope="layer", start=0.1, freeze=0.2)]


def penalty_to_target() -> list[Callback]:
    return [ReweightedPenalty(LOG_SUM, target_sparsity=0.7)]


def prox_to_target() -> list[Callback]:
    return [AdaptiveProx(LOG_SUM, target_sparsity=0.7)]


def mask_to_target() -> list[Callback]:
    return [AdaptiveMask(LOG_SUM, target_sparsity=0.7)]


def joint_to_target() -> list[Callback]:
    return [EtaTrick(LOG_SUM, target_sparsity=0.7)]


def noise_to_target() -> list[Callback]:
    return [VariationalDropout(target_sparsity=0.7)]


def gates_to_target() -> list[Callback]:
    return [HardConcrete(target_sparsity=0.7)]


def sparsify() -> list[Callback]:
    return [Sparsify(0.5)]


def model_pruning() -> list[Callback]:
    return [ModelPruning("l1_unstructured", amount=0.5)]


def prune_optimizer(parameters: Iterable[Parameter]) -> torch.optim.Optimizer:
    """Make torchao's proximal optimiser around Adam, with a lasso on the matrices."""
    from torchao.prototype.pat.optim import PruneOptimizer

    given = [*parameters]
    matrices: dict[str, Any] = {"params": [p for p in given if p.dim() > 1], "prox_type": "ProxLasso", "group_type": "ElemGrouper"}
    others = {"params": [p for p in given if p.dim() <= 1]}
    base = torch.optim.Adam([matrices | {"reg_lambda": 0.5}, *([others] if others["params"] else [])], 1e-2)
    wrapped: torch.optim.Optimizer = PruneOptimizer(base)
    return wrapped


OURS = {
    "Sparsify": Subject("Sparsify", sparsify),
    "ReweightedPenalty": Subject("ReweightedPenalty", penalty),
    "AdaptiveProx": Subject("AdaptiveProx", prox),
    "AdaptiveMask": Subject("AdaptiveMask", mask),
    "AdaptiveMask, Bernoulli": Subject("AdaptiveMask, Bernoulli", bernoulli),
    "PenaltyLoss": Subject("PenaltyLoss", loss),
    "EtaTrick": Subject("EtaTrick", joint),
    "VariationalDropout": Subject("VariationalDropout", additive_noise),
    "HardConcrete": Subject("HardConcrete", gates),
    "MagnitudePruning": Subject("MagnitudePruning", pruning),
}
VARIANTS = {
    "ReweightedPenalty, frozen": Subject("ReweightedPenalty, frozen", frozen),
    "AdaptiveProx, exact": Subject("AdaptiveProx, exact", exact_prox),
    "VariationalDropout, weight": Subject("VariationalDropout, weight", weight_noise),
    "VariationalDropout, local": Subject("VariationalDropout, local", local_noise),
    "MagnitudePruning, by layer": Subject("MagnitudePruning, by layer", pruning_by_layer),
}
TARGETS = {
    "ReweightedPenalty, target": Subject("ReweightedPenalty, target", penalty_to_target),
    "AdaptiveProx, target": Subject("AdaptiveProx, target", prox_to_target),
    "AdaptiveMask, target": Subject("AdaptiveMask, target", mask_to_target),
    "EtaTrick, target": Subject("EtaTrick, target", joint_to_target),
    "VariationalDropout, target": Subject("VariationalDropout, target", noise_to_target),
    "HardConcrete, target": Subject("HardConcrete, target", gates_to_target),
}
VARIANTS |= {name: TARGETS[name] for name in ("ReweightedPenalty, target", "HardConcrete, target")}
COMPILED = {
    "ReweightedPenalty, compiled": Subject("ReweightedPenalty, compiled", compiled_penalty),
    "AdaptiveProx, compiled": Subject("AdaptiveProx, compiled", compiled_prox),
    "AdaptiveMask, compiled": Subject("AdaptiveMask, compiled", compiled_mask),
    "AdaptiveMask, Bernoulli, compiled": Subject("AdaptiveMask, Bernoulli, compiled", compiled_bernoulli),
}
OTHERS = {
    "ModelPruning": Subject("ModelPruning", model_pruning),
    "PruneOptimizer": Subject("PruneOptimizer", tuple, prune_optimizer),
}
# (callback, check) that may be n/a: noise and learned parameters are refused under FSDP2; the subjects' lam brings zeros at any
# learning rate; and only Sparsify and MagnitudePruning have a target here
TARGETED = ("Sparsify", "MagnitudePruning")
WHOLE = ("AdaptiveMask", "AdaptiveMask, Bernoulli", "EtaTrick", "VariationalDropout", "HardConcrete")
SILENT = {(name, "fsdp2_equals_ddp") for name in WHOLE}
SILENT |= {(name, "a_run_without_zeros_says_so") for name in OURS}
SILENT |= {(name, "a_longer_run_keeps_its_target") for name in OURS if name not in TARGETED}


class Alone:
    """Picklable factory of a list with one callback."""

    def __init__(self, make: Callable[[], Callback]) -> None:
        self.make = make

    def __call__(self) -> list[Callback]:
        return [self.make()]
