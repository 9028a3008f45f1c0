"""Define BestAfterTarget: other callbacks' best scores count only once the target sparsity is met."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_sparse import _checks
from lightning_sparse._construction import typed
from lightning_sparse.callbacks import best, logging
from lightning_sparse.callbacks.compatibility import AnyCallback, CallbackClass
from lightning_sparse.callbacks.form import measured_by, peers_of
from lightning_sparse.callbacks.user_warnings import rank_zero_warn
from lightning_sparse.callbacks.weight_averaging import move_to_front


class BestAfterTarget(AnyCallback, metaclass=CallbackClass):
    """Counts the scores of every ModelCheckpoint and EarlyStopping in the Trainer only once the target sparsity is met.

    For programs that keep, restore or stop at their best epoch by callbacks of their own. Before the target is met, each score
    counts as an improvement: the checkpoint callback replaces its oldest file by the latest epoch's, and EarlyStopping's patience is
    not used up. Earlier files keep the worst possible score, so that the next ``save_top_k`` files replace them. The first validation
    at which the target is met restarts the comparison. Metrics, learning-rate schedulers and :class:`SparseCheckpoint`, which has a
    target of its own, are not changed.

    Args:
        target_sparsity: share of zeros in [0, 1] of all sparsity callbacks' weights together; by default each callback's own
            target (``target_sparsity``, MagnitudePruning's ``sparsity``).

    Raises ValueError if fit starts without a sparsity callback, or without any target. Warns at the end of fit if the target
    was never met.
    """

    def __init__(self, target_sparsity: float | None = None) -> None:
        given = target_sparsity
        self.target_sparsity = None if given is None else _checks.share("target_sparsity", given, closed="lr")
        self.held = False

    def __repr__(self) -> str:
        return typed(self)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.held = False
            move_to_front(self, trainer)  # because it must run before the callbacks that compare scores

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        peers = peers_of(trainer)
        if not peers:
            raise ValueError("BestAfterTarget needs a sparsity callback, but the Trainer has none; add one")
        if self.target_sparsity is None and all(peer.target_sparsity is None for peer in peers):
            names = ", ".join(type(peer).__name__ for peer in peers)
            raise ValueError(f"{names} has no target sparsity to wait for; give one, for example BestAfterTarget(target_sparsity=0.9)")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._reset_scores(trainer)  # a checkpoint callback may save every few steps

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._check_target(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.enable_validation:
            self._reset_scores(trainer)
        else:
            self._check_target(trainer)

    def _check_target(self, trainer: Trainer) -> None:
        """Reset the scores until the evaluated weights meet the target; the next score is then the first to count."""
        self._reset_scores(trainer)
        if not self.held:
            self.held = bool(trainer.strategy.broadcast(best.all_met(trainer, self.target_sparsity)))

    def _reset_scores(self, trainer: Trainer) -> None:
        for one in [] if self.held else best.checkpoints(trainer):
            worst = _worst(one)
            one.best_k_models, one.kth_value = dict.fromkeys(one.best_k_models, worst), worst
        for one in [] if self.held else best.stoppers(trainer):
            one.best_score, one.wait_count = _worst(one), 0

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (self.held or trainer.fast_dev_run):  # type: ignore[attr-defined]
            zeros = logging.total(measured_by(peers_of(trainer)))
            rank_zero_warn(
                "the target sparsity was never met at the end of a validation or epoch: the best files are the latest ones, whatever their "
                f"scores; {zeros:.4g} of the weights are zero now. Train longer, raise lam, or lower the target"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"held": self.held}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.held = bool(state_dict.get("held", False))


def _worst(comparing: Any) -> torch.Tensor:
    """Return a score that is worse than every other one."""
    return torch.tensor(float("inf") if comparing.mode == "min" else float("-inf"))
