"""Find callbacks that keep or stop at the best score, and check whether a target sparsity is met."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from lightning_sparse import counts
from lightning_sparse.callbacks import logging
from lightning_sparse.callbacks.compatibility import is_a
from lightning_sparse.callbacks.form import peers_of
from lightning_sparse.callbacks.user_warnings import rank_zero_note, rank_zero_warn


def target_of(callback: Any) -> float | None:
    """Return the share of zeros that a sparsity callback was asked for; None if only its strength was given."""
    target: float | None = getattr(callback, "target_sparsity", None) or getattr(callback, "sparsity", None)
    return target


def _is_ours(callback: object, name: str) -> bool:
    """Compare by class name, because these classes are defined after the sparsity callbacks that ask for them."""
    return any(base.__name__ == name for base in type(callback).__mro__)


def checkpoints(trainer: Trainer) -> list[Any]:
    """Return the checkpoint callbacks that compare a metric over all epochs."""
    found = [one for one in trainer.callbacks if is_a(one, "ModelCheckpoint") and one.monitor]  # type: ignore[attr-defined]
    return [one for one in found if not _is_ours(one, "SparseCheckpoint") and one.save_top_k]


def stoppers(trainer: Trainer) -> list[Any]:
    """Return the callbacks that stop a run when its metric no longer improves."""
    return [one for one in trainer.callbacks if is_a(one, "EarlyStopping")]  # type: ignore[attr-defined]


def is_met(callback: Any, target: float | None = None) -> bool:
    """Return True if a callback's weights, as evaluated and saved, meet its target up to the rounding of each weight's share."""
    target = target_of(callback) if target is None else target
    return target is None or _meets([callback], target)


def _meets(peers: list[Any], target: float) -> bool:
    return logging.total(peers) >= target - rounding(peers)


def joint_target(peers: list[Any]) -> float | None:
    """Return the share of zeros that callbacks with a target reach together; None if one has only a strength, or there are none."""
    targets = [target_of(peer) for peer in peers]
    sizes = [sum(weight.numel() for weight in counts.distinct(peer.parameters).values()) for peer in peers]
    if None in targets or not sum(sizes):
        return None
    return sum(target * size for target, size in zip(targets, sizes, strict=True) if target is not None) / sum(sizes)


def rounding(peers: list[Any]) -> float:
    """Return by how much the share of zeros may miss a target that was met, because whole weights are counted."""
    sizes = [weight.numel() for peer in peers for weight in counts.distinct(peer.parameters).values()]
    return max(1.0, 0.5 * len(sizes)) / sum(sizes) if sum(sizes) else 0.0


def all_met(trainer: Trainer, target: float | None) -> bool:
    """Return True if all sparsity callbacks together meet ``target``, or each its own if ``target`` is None."""
    peers: list[Any] = peers_of(trainer)
    return all(map(is_met, peers)) if target is None else _meets(peers, target)


def is_guarded(trainer: Trainer) -> bool:
    """Return True if BestAfterTarget is among the callbacks."""
    return any(_is_ours(one, "BestAfterTarget") for one in trainer.callbacks)  # type: ignore[attr-defined]


def warn_early_best(callback: Any, trainer: Trainer) -> None:
    """Warn once, before training, of callbacks that may choose an epoch, or stop the run, before the target is met."""
    target = target_of(callback)
    first = next((peer for peer in peers_of(trainer) if target_of(peer) is not None), None)
    if target is None or first is None or first is not callback or is_guarded(trainer) or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    if not (checkpoints(trainer) or stoppers(trainer)) or is_met(first):
        return
    _warn_of_stop(callback, target, trainer)
    others, zeros = checkpoints(trainer), logging.total([first])
    if not others:
        return
    rank_zero_warn(
        f"{type(others[0]).__name__}(monitor={others[0].monitor!r}) compares all epochs, also those in which {type(callback).__name__} has "
        f"not yet reached its target of {target:.4g} (now {zeros:.4g} of the weights are zero): its best file may hold "
        "fewer zeros. Add BestAfterTarget() to the callbacks, which counts scores only once the target is met, or use "
        f"SparseCheckpoint(target_sparsity={target:g}, monitor={others[0].monitor!r}) in its place"
    )


def _warn_of_stop(callback: Any, target: float, trainer: Trainer) -> None:
    """Warn of an EarlyStopping that may end the run before the target is met; only log it with ``finish="prune"``."""
    form = type(callback).__name__
    for one in stoppers(trainer)[:1]:
        pruned = getattr(callback, "finish", "") == "prune"
        end = "finish='prune' then cuts once, without fine-tuning" if pruned else "finish='prune' cuts to the target wherever training ends"
        notify = rank_zero_note if pruned else rank_zero_warn
        notify(
            f"{type(one).__name__}(monitor={one.monitor!r}, patience={one.patience}) may stop the run before {form} reaches its target of "
            f"{target:.4g}. Add BestAfterTarget() to the callbacks, with which epochs count only once the target is met, or give a larger "
            f"patience; {end}"
        )
