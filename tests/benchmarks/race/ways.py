"""The methods of the race, at their defaults: a name, and the callbacks for a target and a number of epochs."""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelPruning

from lightning_sparse import penalties, scores
from lightning_sparse.callbacks import (
    AdaptiveMask,
    AdaptiveProx,
    EtaTrick,
    HardConcrete,
    MagnitudePruning,
    ReweightedPenalty,
    Sparsify,
    VariationalDropout,
)
from lightning_sparse.schedules import Cubic

LOG_SUM = penalties.LogSum(eps=2.0)
DENSE = "dense"
Make = Callable[[float, int], list[Callback]]


def _pruning(score: scores.Score, end: float = 0.75) -> Make:
    return lambda target, epochs: [MagnitudePruning(target_sparsity=target, every=20, score=score, end=end)]


def _lightnings(target: float, epochs: int) -> list[Callback]:
    """Return Lightning's own pruning by magnitude over all layers, along the same ramp, once an epoch."""
    ramp = Cubic(target, 0.0, 0.75)

    def amount(epoch: int) -> float:
        before, after = ramp(epoch, epochs), ramp(epoch + 1, epochs)
        return (after - before) / (1 - before)  # of the weights that are left

    return [ModelPruning("l1_unstructured", use_global_unstructured=True, parameter_names=["weight"], amount=amount)]  # type: ignore[arg-type]


WAYS: dict[str, Make] = {
    DENSE: lambda target, epochs: [],
    "Sparsify": lambda target, epochs: [Sparsify(target)],
    "Sparsify, ramp to 60 %": lambda target, epochs: [Sparsify(target, freeze=0.4)],
    "Sparsify, ramp to 75 %": lambda target, epochs: [Sparsify(target, freeze=0.25)],  # the default but for trained networks
    "MagnitudePruning": _pruning(scores.Magnitude()),
    "pruning, LAMP": _pruning(scores.LAMP()),
    "pruning, LAMP, ramp to 30 %": _pruning(scores.LAMP(), 0.3),
    "AdaptiveMask": lambda target, epochs: [AdaptiveMask(LOG_SUM, target_sparsity=target)],
    "ReweightedPenalty": lambda target, epochs: [ReweightedPenalty(LOG_SUM, target_sparsity=target)],
    "AdaptiveProx": lambda target, epochs: [AdaptiveProx(LOG_SUM, target_sparsity=target)],
    "VariationalDropout": lambda target, epochs: [VariationalDropout(target_sparsity=target)],
    "HardConcrete": lambda target, epochs: [HardConcrete(target_sparsity=target)],
    "EtaTrick": lambda target, epochs: [EtaTrick(LOG_SUM, target_sparsity=target)],
    "pruning, Fisher": _pruning(scores.Fisher()),
    "pruning, relative": _pruning(scores.RelativeMagnitude()),
    "pruning, per layer": _pruning(scores.LayerMagnitude()),
    "ModelPruning": _lightnings,
}
OURS = (
    "Sparsify",
    "Sparsify, ramp to 60 %",
    "Sparsify, ramp to 75 %",
    "AdaptiveMask",
    "ReweightedPenalty",
    "AdaptiveProx",
    "VariationalDropout",
    "HardConcrete",
    "EtaTrick",
)
