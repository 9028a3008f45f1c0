"""ReweightedPenalty: the penalty form, as a gradient."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_sparse import _fused
from lightning_sparse.callbacks import _steps
from lightning_sparse.callbacks.base import Sparsifier


class ReweightedPenalty(Sparsifier):
    """Adds ``lam * w / eta_hat(w)`` to the gradient before each optimiser step (AdaTikhonov; the penalty's own slope).

    The loss that the user sees stays the task's. Gradient clipping by the Trainer includes the addition. Under manual
    optimisation the optimisers of ``self.optimizers()`` are stepped; one stepped behind Lightning's back is refused.
    """

    joins, compiles = True, True

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        cls.compiles = cls.slope is ReweightedPenalty.slope  # the kernel's

    def _forget(self) -> None:
        super()._forget()
        self._fused: _fused.Pull | None = None

    def check_form(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.compile:
            self._fused = _fused.Pull(self.penalty)
            self._fused.check(self.parameters.values())

    @torch.no_grad()
    def before_step(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        strength = self.lam * _steps.scale(trainer, optimizer)
        rows: dict[int, list[tuple[Tensor, Tensor]]] = {1: [], -1: []}
        for _, parameter, group in self._owned(optimizer):
            if parameter.grad is not None:
                rows[-1 if group.get("maximize") else 1].append((parameter, parameter.grad))
        for sign, signed in rows.items():
            for w, grad in _steps.parts(self.penalty, signed, written=1, whole=self.compile):
                self._pull(grad, w, sign * strength)

    def _pull(self, grad: Tensor, w: Tensor, strength: float) -> None:
        if self._fused is None:
            grad.add_(self.slope(w), alpha=strength)
        else:
            self._fused(grad, w, strength)

    def slope(self, w: Tensor) -> Tensor:
        """What ``lam`` multiplies, of the weights that this process holds."""
        return self.penalty.gradient(w)

    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        _steps.check_hooked(self, optimizer)
        super()._stepped(optimizer)
