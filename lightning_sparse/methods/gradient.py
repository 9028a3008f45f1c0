"""Add the penalty's gradient to the weights' gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse import numeric
from lightning_sparse.elementwise import Engine
from lightning_sparse.methods.base import Member, Method, Step


class ReweightedGradient(Method):
    """Adds ``lam * w / eta_hat(w)`` to the gradient before each optimiser step (AdaTikhonov; the penalty's own gradient)."""

    compiles, requires_hook = True, True

    def gradient(self, w: Tensor) -> Tensor:
        """Return the gradient that ``lam`` multiplies."""
        return self.penalty.gradient(w)

    def compile(self, engine: Engine, optimizers: Iterable[tuple[Optimizer, list[Member]]]) -> None:
        weights = [parameter for _, members in optimizers for _, parameter, _ in members]
        engine.compile_add_(self._formula, weights, what=repr(self.penalty))

    @property
    def _formula(self) -> Callable[[Tensor], Tensor]:
        """Return a subclass's own gradient, else the penalty's, so that equal penalties share a kernel."""
        return self.penalty.gradient if type(self).gradient is ReweightedGradient.gradient else self.gradient

    @torch.no_grad()
    def before_optimizer(self, step: Step) -> None:
        columns: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for _, parameter, group in step.trained():
            grads, weights = columns.setdefault(step.lam_on_gradient(group), ([], []))
            grads.append(parameter.grad)  # type: ignore[arg-type]
            weights.append(parameter)
        for lam, (grads, weights) in columns.items():
            step.engine.add_(grads, weights, self._formula, lam, separable=self.penalty.separable)


class LossTerm(ReweightedGradient):
    """Adds ``lam * d Omega(w) / dw`` to the gradient, by autograd from ``omega`` alone: a loss term (the paper's LogSum row)."""

    compiles = False

    def gradient(self, w: Tensor) -> Tensor:
        return numeric.slope(self.penalty.omega, w)
