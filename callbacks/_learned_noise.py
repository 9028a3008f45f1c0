"""LearnedNoise: a form whose noise is learned, and paid for, weight by weight."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_sparse import attach, duality
from lightning_sparse import optimizer as steps
from lightning_sparse.callbacks import _steps
from lightning_sparse.callbacks._learned import Learned
from lightning_sparse.callbacks._noisy import Noisy


class LearnedNoise(Learned, Noisy):
    """Noise of variance w^2 / eta, whose price is added to the gradients before each step: what both are is the subclass's."""

    # -- what a subclass says -----------------------------------------------------------------------------------------------

    def precision(self, w: Tensor, learned: Tensor) -> Tensor:
        """Return the eta of the noise, of weights ``w`` and their learned parameters."""
        raise NotImplementedError

    def hear(self, name: str, grad: Tensor) -> None:
        """Add the gradient in the learned parameter, given that of the noisy weights."""
        raise NotImplementedError

    def pay(self, name: str, parameter: Tensor, strength: float) -> None:
        """Add the gradient of ``strength`` times the price."""
        raise NotImplementedError

    # -- what the form uses ---------------------------------------------------------------------------------------------

    def terms(self, name: str, w: Tensor) -> tuple[Tensor, ...]:
        """Return w and its learned parameters."""
        return w, self.value(name, w)

    def eta_of(self, *terms: Tensor) -> Tensor:
        """Return the learned eta in units of lam, so that the noise's variance is lam / eta as in the other forms."""
        return self.lam * self.precision(*terms)

    def alpha_of(self, *terms: Tensor) -> Tensor:
        """Return the noise's own keep probability, also while lam is still 0."""
        return duality.keep_probability(self.precision(*terms), 1.0)

    @property
    def oscillates(self) -> bool:
        """The noise alone says what is zero."""
        return False

    @property
    def needs_step_sizes(self) -> bool:
        return False

    def _install(self, pl_module: Any, attachment: attach.Attachment) -> None:
        for name in self.parameters:  # before the mask multiplies the gradient
            attachment.on_gradient(name, partial(self._hear, name))
        super()._install(pl_module, attachment)

    @torch.no_grad()
    def _hear(self, name: str, grad: Tensor) -> None:
        if self._loud and name in self._trained and name not in self._local:
            self.hear(name, grad)

    @torch.no_grad()
    def before_step(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        self.reduce_gradients(trainer, optimizer)
        strength = self.lam * steps.grad_scale(getattr(trainer.precision_plugin, "scaler", None), optimizer)
        for name, parameter, group in self._owned(optimizer):
            if parameter.grad is not None:
                self.pay(name, parameter, -strength if group.get("maximize") else strength)

    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        _steps.check_hooked(self, optimizer)
        super()._stepped(optimizer)
