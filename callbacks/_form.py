"""Form: what a way to train with one eta_hat says of a weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_sparse import duality, proximal, shards
from lightning_sparse.callbacks import _groups, _report
from lightning_sparse.callbacks._arguments import Arguments
from lightning_sparse.callbacks._groups import Member


class Form(Arguments):
    """A way to train with one eta_hat, and how another way is made of it."""

    joins: ClassVar[bool] = False  # marks() says which weights are zero, of many parameters together, where the penalty is separable

    @property
    def lam(self) -> float:
        """The strength in force: the schedule's at the current step, its final value before a fit; or what the ascent has found."""
        if self.ascent is not None:
            return self.ascent.lam
        return self.schedule(self.step, self.total) if math.isfinite(self.total) else self.schedule.lam

    @property
    def asked(self) -> float | None:
        """The share of zeros that is asked for now, on the way to a target; None without one."""
        if self.ascent is None:
            return None
        return self.ascent.target if self.frozen else self.ascent.asked

    @property
    def frozen(self) -> bool:
        """The fine-tuning share has begun."""
        return self.support is not None

    def eta(self, name: str, w: Tensor) -> Tensor:
        """The eta that the form uses for weights ``w`` of a parameter, or of the part of it that this process holds."""
        return self.penalty.eta_hat(w)

    def keep_probability(self, name: str, w: Tensor | None = None) -> Tensor:
        """alpha of each weight of a parameter, as this form uses it; ``w``: of other values for it, such as an average."""
        return shards.elementwise(partial(self._alpha, name), self._live(name) if w is None else w)

    def _alpha(self, name: str, w: Tensor) -> Tensor:
        return self._alpha_of(self.eta(name, w))

    def _alpha_of(self, eta: Tensor) -> Tensor:
        return duality.keep_probability(eta, self.lam) if self.lam > 0 else torch.ones_like(eta)

    def cost(self, weights: list[Tensor]) -> float:
        """lam * Omega of ``weights``, which is logged as ``sparsity/penalty``."""
        return duality.penalty_value(self.penalty, weights, self.lam)

    def zeros(self, name: str, w: Tensor | None = None) -> Tensor:
        """Which weights of a parameter (or other values ``w`` for it) count as zero.

        Outside a frozen support; else where alpha < ``tol``, or |w| <= ``threshold``, or where the optimiser's steps only
        carry the weight back and forth over a zero at which the penalty would hold it.
        """
        w = self._live(name) if w is None else w
        if self.support is not None:
            return ~self.support[name].to(w.device)
        known = name in self._places and self.lam > 0 and self.penalty.separable
        resting = shards.elementwise(partial(self.at_rest, name), w) if known else None
        return self.also_cut(name, self._counted(w, self.keep_probability(name, w), resting))

    def also_cut(self, name: str, zeros: Tensor) -> Tensor:
        """``zeros`` and the weights of a parameter that were removed by rank."""
        return zeros | ~self.cut[name].to(zeros.device) if name in self.cut else zeros

    def _counted(self, w: Tensor, alpha: Tensor, resting: Tensor | None) -> Tensor:
        below = (alpha < self.tol) | (w == 0)
        below = below if resting is None else below | resting
        return below if self.threshold is None else below | (w.abs() <= self.threshold)

    def eta_terms(self, name: str, w: Tensor) -> tuple[Tensor, ...] | None:
        """What eta is made of, weight by weight, of weights ``w`` of a parameter; None where it is not known yet."""
        return (w,)

    def eta_of(self, *terms: Tensor) -> Tensor:
        """eta of :meth:`eta_terms`, element by element."""
        return self.penalty.eta_hat(terms[0])

    def marks(self, terms: Sequence[Tensor], group: dict[str, Any], state: Mapping[str, Any]) -> Tensor:
        """:meth:`zeros` of weights by their :meth:`eta_terms`, element by element, under an optimiser's group and state."""
        w = terms[0]
        rests = self.lam > 0 and self.oscillates
        resting = self._rests(w, proximal.rate(state, group, "auto"), group) if rests else None
        return self._counted(w, self._alpha_of(self.eta_of(*terms)), resting)

    def thresholded(self, name: str, w: Tensor | None = None) -> Tensor:
        """A parameter's weights (or other values ``w`` for it) with true zeros: what evaluation and files see."""
        w = self._live(name) if w is None else w
        return w.masked_fill(self.zeros(name, w), 0.0)

    def evaluated(self, name: str) -> Tensor:
        """What is evaluated and saved of a parameter, before the threshold: an average, where one takes its place."""
        return self._live(name)

    def _owned(self, optimizer: torch.optim.Optimizer) -> list[Member]:
        """(name, parameter, group) of each selected parameter that ``optimizer`` updates."""
        self._members[id(optimizer)] = found = _groups.members(self.parameters, optimizer, self._members.get(id(optimizer)))
        return found[1]

    def at_rest(self, name: str, w: Tensor) -> Tensor:
        """Which weights of the part that this process holds only oscillate around a zero at which the penalty would hold them."""
        if not self.oscillates:
            return w == 0
        optimizer, number = self._places[name]
        state, group = self._step_sizes.of(optimizer, self.parameters[name], optimizer.param_groups[number])
        return self._rests(w, proximal.rate(state, group, "auto"), group)

    @property
    def oscillates(self) -> bool:
        """The form's pull carries weights over a zero that it would hold them at."""
        return True

    @property
    def needs_step_sizes(self) -> bool:
        """What counts as zero, or the form's own step, depends on the optimiser's step size."""
        return self.oscillates and self.penalty.separable

    def _rests(self, w: Tensor, rho: Tensor | float, group: dict[str, Any]) -> Tensor:
        return proximal.rests(self.penalty, w, rho, self.lam * self._clipping.mean, proximal.memory(group))

    def _live(self, name: str) -> Tensor:
        return self.parameters[name].detach() if self.attachment is None else self.attachment.live(name)

    def figures(self) -> dict[str, float]:
        """The values that are logged, as fractions in [0, 1] where they are shares."""
        return _report.figures(self)
