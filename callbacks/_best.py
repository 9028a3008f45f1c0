"""Callbacks that keep or stop at the best score, beside a target sparsity that the first epochs do not meet."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_sparse import counts
from lightning_sparse.callbacks import _report
from lightning_sparse.callbacks.compatibility import is_a


def target_of(callback: Any) -> float | None:
    """The share of zeros that a sparsity callback was asked for; None where only its strength was given."""
    target: float | None = getattr(callback, "target_sparsity", None) or getattr(callback, "sparsity", None)
    return target


def _is_ours(callback: object, name: str) -> bool:
    """By name, because these classes are made after the sparsity callbacks, which ask."""
    return any(base.__name__ == name for base in type(callback).__mro__)


def checkpoints(trainer: Trainer) -> list[Any]:
    """Checkpoint callbacks that compare a metric over all epochs."""
    found = [one for one in trainer.callbacks if is_a(one, "ModelCheckpoint") and one.monitor]  # type: ignore[attr-defined]
    return [one for one in found if not _is_ours(one, "SparseCheckpoint") and one.save_top_k]


def stoppers(trainer: Trainer) -> list[Any]:
    """Callbacks that stop a run whose metric no longer improves."""
    return [one for one in trainer.callbacks if is_a(one, "EarlyStopping")]  # type: ignore[attr-defined]


def is_met(callback: Any, target: float | None = None) -> bool:
    """The share of zeros that is evaluated and saved of a callback's weights meets its target, but for the rounding of each weight's."""
    target = target_of(callback) if target is None else target
    return target is None or _meets([callback], target)


def _meets(peers: list[Any], target: float) -> bool:
    sizes = [weight.numel() for peer in peers for weight in counts.distinct(peer.parameters).values()]
    rounding = max(1.0, 0.5 * len(sizes)) / max(sum(sizes), 1)
    return _report.total(peers) >= target - rounding


def all_met(trainer: Trainer, target: float | None) -> bool:
    """``target`` by all sparsity callbacks together; without one each by its own."""
    peers: list[Any] = _report.peers_of(trainer)
    return all(map(is_met, peers)) if target is None else _meets(peers, target)


def say_unmet(callback: Any, trainer: Trainer) -> None:
    """Warn once, before training, of a checkpoint callback whose best may be of an epoch before the target is met."""
    target, others = target_of(callback), checkpoints(trainer)
    guarded = any(_is_ours(one, "BestAfterTarget") for one in trainer.callbacks)  # type: ignore[attr-defined]
    first = next((peer for peer in _report.peers_of(trainer) if target_of(peer) is not None), None)
    if target is None or first is None or first is not callback or not others or guarded or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    zeros = _report.total([first])
    if is_met(first):
        return
    rank_zero_warn(
        f"{type(others[0]).__name__}(monitor={others[0].monitor!r}) compares all epochs, also those in which {type(callback).__name__} has "
        f"not yet reached its target of {target:.4g} (now {zeros:.4g} of the weights are zero): its best file may hold "
        "fewer zeros. Add BestAfterTarget() to the callbacks, which lets scores count from the target on, or use "
        f"SparseCheckpoint(target={target:g}, monitor={others[0].monitor!r}) in its place"
    )
