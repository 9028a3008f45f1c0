"""Gradients that a form adds itself, before the optimiser steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_sparse import shards
from lightning_sparse._pieces import pieces
from lightning_sparse.duality import Penalty

if TYPE_CHECKING:
    from lightning_sparse.callbacks.base import Sparsifier


def scale(trainer: Trainer, optimizer: torch.optim.Optimizer) -> float:
    """What an added gradient is multiplied by: a fused optimiser unscales fp16 gradients itself, so it must be given scaled ones."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())


def parts(penalty: Penalty, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The parts of ``tensors`` that this process holds, piece by piece where a weight's penalty does not depend on the others."""
    held = [shards.local(tensor.detach()) for tensor in tensors]
    return pieces(*held) if penalty.separable else [tuple(held)]


def check_hooked(callback: Sparsifier, optimizer: torch.optim.Optimizer) -> None:
    """RuntimeError for an optimiser that was stepped behind Lightning's back, so that nothing was added to its gradients."""
    if callback._closures == 0 and not callback.frozen:
        raise RuntimeError(
            f"{type(optimizer).__name__}.step() was called without Lightning's on_before_optimizer_step, where "
            f"{type(callback).__name__} adds its gradient; step the optimisers of self.optimizers(), or use AdaptiveProx"
        )
