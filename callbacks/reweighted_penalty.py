"""ReweightedPenalty: the penalty form, as a gradient."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_sparse.callbacks import _steps
from lightning_sparse.callbacks.base import Sparsifier


class ReweightedPenalty(Sparsifier):
    """Adds ``lam * w / eta_hat(w)`` to the gradient before each optimiser step (AdaTikhonov; the penalty's own slope).

    The loss that the user sees stays the task's. Gradient clipping by the Trainer includes the addition. Under manual
    optimisation the optimisers of ``self.optimizers()`` are stepped; one stepped behind Lightning's back is refused.
    """

    joins = True

    @torch.no_grad()
    def before_step(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        strength = self.lam * _steps.scale(trainer, optimizer)
        rows: dict[int, list[tuple[Tensor, Tensor]]] = {1: [], -1: []}
        for _, parameter, group in self._owned(optimizer):
            if parameter.grad is not None:
                rows[-1 if group.get("maximize") else 1].append((parameter, parameter.grad))
        for sign, signed in rows.items():
            for w, grad in _steps.parts(self.penalty, signed, written=1):
                grad.add_(self.slope(w), alpha=sign * strength)

    def slope(self, w: Tensor) -> Tensor:
        """What ``lam`` multiplies, of the weights that this process holds."""
        return self.penalty.gradient(w)

    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        _steps.check_hooked(self, optimizer)
        super()._stepped(optimizer)
