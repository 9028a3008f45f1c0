"""Find callbacks that keep or stop at the best score, and check whether a target sparsity is met."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from lightning_sparse import counts
from lightning_sparse.callbacks import logging
from lightning_sparse.callbacks.compatibility import those_of
from lightning_sparse.callbacks.form import SparsityCallback, measured_by, peers_of
from lightning_sparse.callbacks.options import Options
from lightning_sparse.callbacks.user_warnings import rank_zero_note, rank_zero_warn


def _is_ours(callback: object, name: str) -> bool:
    """Compare by class name, because these classes are defined after the sparsity callbacks that ask for them."""
    return any(base.__name__ == name for base in type(callback).__mro__)


def checkpoints(trainer: Trainer) -> list[Any]:
    """Return the checkpoint callbacks that compare a metric over all epochs."""
    found = those_of(trainer, "ModelCheckpoint")
    return [one for one in found if one.monitor and one.save_top_k and not _is_ours(one, "SparseCheckpoint")]


def stoppers(trainer: Trainer) -> list[Any]:
    """Return the callbacks that stop a run when its metric no longer improves."""
    return those_of(trainer, "EarlyStopping")


def is_met(peers: list[SparsityCallback], target: float | None) -> bool:
    """Return True if the callbacks' weights, as evaluated and saved, meet a target up to the rounding of each weight's share."""
    return target is None or logging.total(measured_by(peers)) >= target - rounding(peers)


def rounding(peers: list[SparsityCallback]) -> float:
    """Return by how much the share of zeros may miss a target that was met, because whole weights are counted."""
    sizes = [weight.numel() for peer in peers for weight in counts.distinct(peer.parameters).values()]
    return max(1.0, 0.5 * len(sizes)) / sum(sizes) if sum(sizes) else 0.0


def all_met(trainer: Trainer, target: float | None) -> bool:
    """Return True if all sparsity callbacks together meet ``target``, or each its own if ``target`` is None."""
    peers = peers_of(trainer)
    return all(is_met([peer], peer.target_sparsity) for peer in peers) if target is None else is_met(peers, target)


def is_guarded(trainer: Trainer) -> bool:
    """Return True if BestAfterTarget is among the callbacks."""
    return any(_is_ours(one, "BestAfterTarget") for one in trainer.callbacks)  # type: ignore[attr-defined]


def warn_early_best(options: Options, trainer: Trainer) -> None:
    """Warn once, before training, of callbacks that may choose an epoch, or stop the run, before the target is met."""
    target, others = options.target_sparsity, checkpoints(trainer)
    first = next((peer for peer in peers_of(trainer) if peer.target_sparsity is not None), None)
    if target is None or first is None or first.options is not options or is_guarded(trainer) or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    if not (others or stoppers(trainer)) or is_met([first], target):
        return
    _warn_of_stop(options, target, trainer)
    if not others:
        return
    zeros = logging.total([first.measured])
    rank_zero_warn(
        f"{type(others[0]).__name__}(monitor={others[0].monitor!r}) compares all epochs, also those in which {options.form} has "
        f"not yet reached its target of {target:.4g} (now {zeros:.4g} of the weights are zero): its best file may hold "
        "fewer zeros. Add BestAfterTarget() to the callbacks, which counts scores only once the target is met, or use "
        f"SparseCheckpoint(target_sparsity={target:g}, monitor={others[0].monitor!r}) in its place"
    )


def _warn_of_stop(options: Options, target: float, trainer: Trainer) -> None:
    """Warn of an EarlyStopping that may end the run before the target is met; only log it with ``finish="prune"``."""
    for one in stoppers(trainer)[:1]:
        pruned = options.finish == "prune"
        end = "finish='prune' then cuts once, without fine-tuning" if pruned else "finish='prune' cuts to the target wherever training ends"
        notify = rank_zero_note if pruned else rank_zero_warn
        notify(
            f"{type(one).__name__}(monitor={one.monitor!r}, patience={one.patience}) may stop the run before {options.form} reaches its "
            f"target of {target:.4g}. Add BestAfterTarget() to the callbacks, with which epochs count only once the target is met, or give "
            f"a larger patience; {end}"
        )
