"""Define SparseCheckpoint: a ModelCheckpoint whose best files count only once the target sparsity is met."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_sparse import _checks, counts
from lightning_sparse._construction import typed
from lightning_sparse.callbacks import best, logging
from lightning_sparse.callbacks.compatibility import AnyModelCheckpoint, CallbackClass
from lightning_sparse.callbacks.form import measured_by, peers_of
from lightning_sparse.callbacks.options import only_one
from lightning_sparse.callbacks.sparsity_monitor import SparsityMonitor
from lightning_sparse.callbacks.user_warnings import rank_zero_warn
from lightning_sparse.callbacks.weight_averaging import saved_module
from lightning_sparse.select import select


class SparseCheckpoint(AnyModelCheckpoint, metaclass=CallbackClass):
    """ModelCheckpoint that saves a best file (the top k) only while the share ``target_sparsity`` of its weights is zero, to the weight.

    The share is counted for every file. With sparsity callbacks in the Trainer it is their ``sparsity/total``, after the
    threshold and, with WeightAveraging, of the average. Without one it is the share of exact zeros in the SparsityMonitor's
    selection, or else in the default selection. The score is that of validation, which used the same weights. With
    ``save_last=True`` the last file is written from the start, and files written on an exception do not depend on the target.

    Args:
        target: the old name of ``target_sparsity``, the smallest share of zeros in [0, 1] for a best file.
        target_sparsity: the same, by the name used in the sparsity callbacks.
        settings: ModelCheckpoint's own arguments, such as ``monitor``, ``mode``, ``dirpath`` and ``save_top_k``.

    Raises TypeError or ValueError for a ``target_sparsity`` that is not a share, ValueError for ``save_last="link"``. Warns at the end
    of fit, with the largest sparsity seen, if the target was never met when a file was due.
    """

    def __init__(self, target: float | None = None, *, target_sparsity: float | None = None, **settings: Any) -> None:
        share = only_one("SparseCheckpoint", "target", target, target_sparsity)
        self.target = _checks.share("target" if target_sparsity is None else "target_sparsity", share, closed="lr")
        super().__init__(**settings)
        self._settings = settings
        if self.save_last == "link":
            raise ValueError("save_last='link' would link to a best file that may not exist yet; use save_last=True")
        if "mode" not in settings and self.monitor is not None and _checks.is_larger_better(self.monitor.replace("score", "")):
            rank_zero_warn(
                f"SparseCheckpoint(monitor={self.monitor!r}) without a mode keeps the file of the smallest value, as ModelCheckpoint does; "
                "give mode='max' to keep that of the largest"
            )
        self.highest, self.held = 0.0, False
        self._names: list[str] = []  # parameters whose exact zeros are counted without a sparsity callback

    def __repr__(self) -> str:
        return typed(self, {**self._settings, "target": None, "target_sparsity": self.target})

    @property
    def state_key(self) -> str:
        return f"{super().state_key}, target={self.target}"

    def sparsity(self, trainer: Trainer, module: LightningModule) -> float:
        """Return the share of zeros that a file written now would have, in [0, 1], the same on every rank."""
        peers = peers_of(trainer)
        share = logging.total(measured_by(peers), self.save_weights_only) if peers else self._exact_zeros(trainer, module)
        return float(trainer.strategy.broadcast(share))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if not peers_of(trainer):
            monitors = (one for one in trainer.callbacks if isinstance(one, SparsityMonitor))  # type: ignore[attr-defined]
            patterns = next((monitor.select for monitor in monitors), None)
            self._names = [counts.weight_in_use(pl_module, name)[0] for name in select(pl_module, patterns, trainable=False)]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        peers = peers_of(trainer)
        whole = logging.joint_share(measured_by(peers), [peer.target_sparsity for peer in peers])
        if whole is None or whole >= self.target - best.rounding(peers) or not self.save_top_k or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        names = " and ".join(dict.fromkeys(type(peer).__name__ for peer in peers))
        rank_zero_warn(
            f"SparseCheckpoint(target_sparsity={self.target:g}) saves a best file only once that share of the weights is zero, but {names} "
            f"makes {whole:.4g} of them zero, so it would save none: give it target_sparsity={whole:.4g} or less, or raise that of {names}"
        )

    def _exact_zeros(self, trainer: Trainer, module: LightningModule) -> float:
        saved = saved_module(trainer, module, self.save_weights_only)
        return counts.share(counts.count_zeros(dict(counts.weight_in_use(saved, name) for name in self._names)))

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self._check_monitor(trainer, monitor_candidates)
        share = self.sparsity(trainer, trainer.lightning_module)
        self.highest = max(self.highest, share)
        if share >= self.target - best.rounding(peers_of(trainer)):
            self.held = True
            super()._save_topk_checkpoint(trainer, monitor_candidates)
        elif self.save_last:  # because the last file is written only if a best file was due at this step
            self._last_global_step_saved = trainer.global_step

    def _check_monitor(self, trainer: Trainer, logged: Mapping[str, Tensor]) -> None:
        """Raise MisconfigurationException, with the closest names, for a monitored figure that is not logged once validation has run.

        ModelCheckpoint checks when a file is due, which is here only when the target is met.
        """
        name, validated = self.monitor, trainer.fit_loop.epoch_loop.val_loop._has_run
        if self.save_top_k and name is not None and name not in logged and validated:
            names = ", ".join(map(repr, sorted(key for key in logged if key not in ("epoch", "step"))))
            raise MisconfigurationException(
                f"SparseCheckpoint(monitor={name!r}): no figure of that name is logged{_checks.closest(name, logged)}. Logged are {names}"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_end(trainer, pl_module)
        if not (self.held or trainer.fast_dev_run) and self.save_top_k:  # type: ignore[attr-defined]
            cure = "Raise lam or the callback's own target_sparsity, train longer, or lower this one"
            if not peers_of(trainer):
                cure = (
                    f"There is no sparsity callback in the Trainer: add one, such as Sparsify(target_sparsity={self.target:g}), unless "
                    "others make the zeros"
                )
            rank_zero_warn(
                f"SparseCheckpoint saved no best file: its target_sparsity={self.target:g} was never met when a file was due; the largest "
                f"sparsity there was {self.highest:.4g}. {cure}"
            )

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"target": self.target, "highest": self.highest, "held": self.held}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.highest, self.held = state_dict.get("highest", 0.0), state_dict.get("held", False)
