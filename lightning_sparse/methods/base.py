"""What a way to train is: a method with its formulas, and the step that it acts on. Torch only; any training loop can call it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_sparse import duality, proximal
from lightning_sparse.duality import Penalty
from lightning_sparse.elementwise import Engine
from lightning_sparse.optimizer import momentum_gain
from lightning_sparse.step_sizes import StepSizes

Member = tuple[str, Parameter, dict[str, Any]]  # name, parameter, param group


@dataclass
class Step:
    """One step of an optimiser, and the strengths that lam has in it.

    ======================  ==========================================  ======================================
    strength                lam times                                   used by
    ======================  ==========================================  ======================================
    ``lam_on_gradient``     AMP scale, -1 where the group maximises     gradient terms: penalty, loss, eta-trick,
                                                                        learned noise
    ``lam_on_prox``         the step's clip factor, momentum gain       proximal steps
    ``lam``                 the mean clip factor (the caller's; the     the zero test: ``Method.is_at_rest``
                            zero region also uses the momentum's
                            memory)
    ``lam``                 1; calibrated by the curvature              masks
    ======================  ==========================================  ======================================

    Args:
        optimizer: the optimiser that steps.
        members: (name, parameter, param group) of each selected parameter that it updates.
        lam: the strength in force.
        engine: runs functions over many tensors.
        live: the live weights of a parameter, by name; by default its data.
        sizes: step sizes of the optimiser.
        grad_scale: what a fused optimiser's gradients are still scaled by; 1 elsewhere.
        clip_factor: by what gradient clipping multiplied this step's gradients.
    """

    optimizer: Optimizer
    members: list[Member]
    lam: float
    engine: Engine
    live: Callable[[str], Tensor] | None = None
    sizes: StepSizes = field(default_factory=StepSizes)
    grad_scale: float = 1.0
    clip_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.live is None:
            parameters = {name: parameter for name, parameter, _ in self.members}
            self.live = lambda name: parameters[name].detach()

    def trained(self) -> Iterable[Member]:
        """Yield the members that have a gradient."""
        return (member for member in self.members if member[1].grad is not None)

    def lam_on_gradient(self, group: dict[str, Any]) -> float:
        """Return lam for a term that is added to gradients of a param group."""
        return self.lam * self.grad_scale * (-1 if group.get("maximize") else 1)

    def lam_on_prox(self, group: dict[str, Any]) -> float:
        """Return lam for a proximal step after the optimiser's, on a param group."""
        return momentum_gain(group) * (self.lam * self.clip_factor)


class Method:
    """A way to train a network to zeros: what it does at each moment of a step, and its eta, keep probability and zero region.

    The moments of a step, in order: :meth:`before_optimizer` (after backward, before clipping) and :meth:`after_optimizer`. The
    formulas are elementwise functions of :meth:`terms`, so that one call serves many tensors.
    """

    needs_separable: ClassVar[bool] = True  # takes only penalties of single weights
    compiles: ClassVar[bool] = False  # has kernels
    takes_parts: ClassVar[bool] = True  # works on weights that FSDP2 splits over processes

    def __init__(self, penalty: Penalty) -> None:
        self.penalty = penalty

    # -- moments ----------------------------------------------------------------------------------------------------------

    def compile(self, engine: Engine, optimizers: Iterable[tuple[Optimizer, list[Member]]]) -> None:
        """Make the method's kernels; RuntimeError where that fails."""

    def before_optimizer(self, step: Step) -> None:
        """Change the gradients, before they are clipped and the optimiser steps."""

    def after_optimizer(self, step: Step) -> None:
        """Change the weights, after the optimiser has stepped."""

    # -- formulas, element by element -------------------------------------------------------------------------------------

    def terms(self, name: str, w: Tensor) -> tuple[Tensor, ...] | None:
        """Return the tensors that eta is computed from: ``w``, values of a parameter's weights, first. None while eta is infinite."""
        return (w,)

    def eta(self, lam: float, *terms: Tensor) -> Tensor:
        """Return the eta that the method uses, of :meth:`terms`."""
        return self.penalty.eta_hat(terms[0])

    def alpha(self, lam: float, *terms: Tensor) -> Tensor:
        """Return the keep probability that the method uses, of :meth:`terms`."""
        eta = self.eta(lam, *terms)
        return duality.alpha_of(eta, lam) if lam > 0 else torch.ones_like(eta)

    @property
    def oscillates(self) -> bool:
        """Whether its steps carry weights back and forth over a zero at which the penalty would hold them."""
        return True

    def is_at_rest(self, lam: float, rho: Tensor | float, memory: float, *terms: Tensor) -> Tensor:
        """Return which weights are in the penalty's zero region, at a step size ``rho`` and a momentum of ``memory`` steps."""
        return proximal.in_zero_region(self.penalty, terms[0], rho, lam, memory)

    def penalty_value(self, weights: list[Tensor], lam: float) -> float:
        """Return lam * Omega of ``weights``; a collective for weights that are split over processes."""
        return duality.penalty_value(self.penalty, weights, lam)
