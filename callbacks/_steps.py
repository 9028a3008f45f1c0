"""What a form does to gradients and weights itself, around the optimiser's step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer

if TYPE_CHECKING:
    from lightning_sparse.callbacks.base import Sparsifier


def loss_scale(trainer: Trainer, manual: bool) -> float:
    """What Lightning multiplied the loss by before its backward: an fp16 scale, and one part of the batches of an accumulation."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    factor = 1.0 if scaler is None else float(scaler.get_scale())
    return factor / (1 if manual else trainer.accumulate_grad_batches)


def check_hooked(callback: Sparsifier, optimizer: torch.optim.Optimizer) -> None:
    """RuntimeError for an optimiser that was stepped behind Lightning's back, so that nothing was added to its gradients."""
    if not callback._clock.is_prepared(optimizer) and not callback.frozen:
        raise RuntimeError(
            f"{type(optimizer).__name__}.step() was called without Lightning's on_before_optimizer_step, where "
            f"{type(callback).__name__} adds its gradient; step the optimisers of self.optimizers(), or use AdaptiveProx"
        )
