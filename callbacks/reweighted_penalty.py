"""ReweightedPenalty: the penalty form, as a gradient."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_sparse.callbacks.base import Sparsifier


class ReweightedPenalty(Sparsifier):
    """Adds ``lam * w / eta_hat(w)`` to the gradient before each optimiser step (AdaTikhonov; the penalty's own slope).

    The loss that the user sees stays the task's. Gradient clipping by the Trainer includes the addition.
    """

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self.frozen:
            return
        strength = self.lam * _scale(trainer, optimizer)
        for name, parameter, _ in self._owned(optimizer):
            if parameter.grad is not None:
                parameter.grad.add_(self.penalty.gradient(self._live(name)), alpha=strength)


def _scale(trainer: Trainer, optimizer: torch.optim.Optimizer) -> float:
    """A fused optimiser unscales fp16 gradients itself, so that what it is given must be scaled."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())
