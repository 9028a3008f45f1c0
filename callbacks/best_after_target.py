"""BestAfterTarget: other callbacks' best score counts only once the target sparsity holds."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_sparse import _checks
from lightning_sparse._construction import Constructed, typed
from lightning_sparse.callbacks import _averages, _best, _report
from lightning_sparse.callbacks.compatibility import AnyCallback


class BestAfterTarget(AnyCallback, metaclass=Constructed):
    """Lets the scores of every ModelCheckpoint and EarlyStopping in the Trainer count only once the target sparsity holds.

    For programs that keep, restore or stop at their best epoch by callbacks of their own. Before the target each score is
    taken as an improvement: the checkpoint callback replaces its oldest file by the latest epoch's, with its true score, and
    EarlyStopping's patience does not run. The first validation at which the target holds starts the comparison anew. Metrics,
    learning-rate schedulers and :class:`SparseCheckpoint`, which has a target of its own, are left alone.

    Args:
        target_sparsity: share of zeros in [0, 1] of all sparsity callbacks' weights together; by default each callback's own
            target (``target_sparsity``, MagnitudePruning's ``sparsity``).

    Raises ValueError where fit starts without a sparsity callback, or without any target. Warns at the end of fit if the target
    never held.
    """

    def __init__(self, target_sparsity: float | None = None) -> None:
        given = target_sparsity
        self.target_sparsity = None if given is None else _checks.between("target_sparsity", given, 0, 1, closed="lr")
        self.held = False

    def __repr__(self) -> str:
        return typed(self)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.held = False
            _averages.stand_first(self, trainer)  # before the callbacks that compare scores

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        peers = _report.peers_of(trainer)
        if not peers:
            raise ValueError("BestAfterTarget waits for the zeros of a sparsity callback, but the Trainer has none; add one")
        if self.target_sparsity is None and all(_best.target_of(peer) is None for peer in peers):
            names = ", ".join(type(peer).__name__ for peer in peers)
            raise ValueError(f"{names} has no target sparsity to wait for; name one, for example BestAfterTarget(target_sparsity=0.9)")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._forget_scores(trainer)  # a checkpoint callback may save every few steps

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._look(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.enable_validation:
            self._forget_scores(trainer)
        else:
            self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        """The score that comes next is the first to count, if the weights that it was measured on meet the target."""
        self._forget_scores(trainer)
        if not self.held:
            self.held = bool(trainer.strategy.broadcast(_best.all_met(trainer, self.target_sparsity)))

    def _forget_scores(self, trainer: Trainer) -> None:
        for one in [] if self.held else _best.checkpoints(trainer):
            worst = _worst(one)
            one.best_k_models, one.kth_value = dict.fromkeys(one.best_k_models, worst), worst
        for one in [] if self.held else _best.stoppers(trainer):
            one.best_score, one.wait_count = _worst(one), 0

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (self.held or trainer.fast_dev_run):  # type: ignore[attr-defined]
            zeros = _report.total(_report.peers_of(trainer))
            rank_zero_warn(
                "the target sparsity never held at the end of a validation or epoch: the best files are the latest ones, whatever their "
                f"scores; {zeros:.4g} of the weights are zero now. Train longer, raise lam, or lower the target"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"held": self.held}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.held = bool(state_dict.get("held", False))


def _worst(comparing: Any) -> torch.Tensor:
    """A score that every other one is better than."""
    return torch.tensor(float("inf") if comparing.mode == "min" else float("-inf"))
