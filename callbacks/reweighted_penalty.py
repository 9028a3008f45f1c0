"""ReweightedPenalty: the penalty form, as a gradient."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer

from lightning_sparse import shards
from lightning_sparse.callbacks.base import Sparsifier


class ReweightedPenalty(Sparsifier):
    """Adds ``lam * w / eta_hat(w)`` to the gradient before each optimiser step (AdaTikhonov; the penalty's own slope).

    The loss that the user sees stays the task's. Gradient clipping by the Trainer includes the addition. Under manual
    optimisation the optimisers of ``self.optimizers()`` are stepped; one stepped behind Lightning's back is refused.
    """

    def before_step(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        strength = self.lam * _scale(trainer, optimizer)
        for name, parameter, group in self._owned(optimizer):
            if parameter.grad is not None:
                sign = -1 if group.get("maximize") else 1
                slope = self.penalty.gradient(shards.local(self._live(name)))
                shards.local(parameter.grad.detach()).add_(slope, alpha=sign * strength)

    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        if self._closures == 0 and not self.frozen:
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() was called without Lightning's on_before_optimizer_step, where "
                f"{type(self).__name__} adds its gradient; step the optimisers of self.optimizers(), or use AdaptiveProx"
            )
        super()._stepped(optimizer)


def _scale(trainer: Trainer, optimizer: torch.optim.Optimizer) -> float:
    """A fused optimiser unscales fp16 gradients itself, so that what it is given must be scaled."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())
