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
    """``grad += lam * w / eta_hat(w)`` before each optimiser step (AdaTikhonov; the penalty's own gradient)."""

    compiles = True

    def gradient(self, w: Tensor) -> Tensor:
        """Return what ``lam`` multiplies."""
        return self.penalty.gradient(w)

    def compile(self, engine: Engine, optimizers: Iterable[tuple[Optimizer, list[Member]]]) -> None:
        weights = [parameter for _, members in optimizers for _, parameter, _ in members]
        engine.compile_add_(self._formula, weights, what=repr(self.penalty))

    @property
    def _formula(self) -> Callable[[Tensor], Tensor]:
        """A subclass's own gradient, else the penalty's, by which equal penalties share a kernel."""
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
    """``grad += lam * d Omega(w) / dw``, by autograd from ``omega`` alone: the gradient of a term in the loss (the paper's LogSum row)."""

    compiles = False

    def gradient(self, w: Tensor) -> Tensor:
        return numeric.slope(self.penalty.omega, w)
