"""ReweightedPenalty: the penalty's gradient, added before each optimiser step."""

from __future__ import annotations

import torch

from lightning_sparse.callbacks import _steps
from lightning_sparse.callbacks.base import Sparsifier
from lightning_sparse.methods.gradient import ReweightedGradient


class ReweightedPenalty(Sparsifier):
    """Adds ``lam * w / eta_hat(w)`` to the gradient before each optimiser step (AdaTikhonov; the penalty's own slope).

    The loss that the user sees stays the task's. Gradient clipping by the Trainer includes the addition. Under manual
    optimisation the optimisers of ``self.optimizers()`` are stepped; one stepped behind Lightning's back is refused.
    """

    compiles = True

    def _make_method(self) -> ReweightedGradient:
        return ReweightedGradient(self.penalty)

    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        _steps.check_hooked(self, optimizer)
        super()._stepped(optimizer)
