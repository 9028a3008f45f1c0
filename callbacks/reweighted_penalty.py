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
        columns: dict[int, tuple[list[Tensor], list[Tensor]]] = {1: ([], []), -1: ([], [])}  # weights and gradients
        for _, parameter, group in self._owned(optimizer):
            if parameter.grad is not None:
                weights, grads = columns[-1 if group.get("maximize") else 1]
                weights.append(parameter)
                grads.append(parameter.grad)
        for sign, signed in columns.items():
            self._pull(signed, sign * strength)

    def _pull(self, columns: tuple[list[Tensor], list[Tensor]], strength: float) -> None:
        if self._fused is None:
            _steps.add(self._joint, self.penalty, columns, self.slope, strength)
        else:
            for w, grad in _steps.parts(self._joint, self.penalty, columns, written=1, whole=True):
                self._fused(grad, w, strength)

    def slope(self, w: Tensor) -> Tensor:
        """What ``lam`` multiplies, of the weights that this process holds."""
        return self.penalty.gradient(w)

    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        _steps.check_hooked(self, optimizer)
        super()._stepped(optimizer)
