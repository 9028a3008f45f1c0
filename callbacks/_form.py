"""Form: what a way to train with one eta_hat says of a weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_sparse import duality
from lightning_sparse import optimizer as steps
from lightning_sparse.callbacks import _groups, _report
from lightning_sparse.callbacks._arguments import Arguments
from lightning_sparse.callbacks._groups import Member


class Form(Arguments):
    """A way to train with one eta_hat, and how another way is made of it."""

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
        """The support no longer changes."""
        return self.support is not None

    # -- the formulas, element by element --------------------------------------------------------------------------------

    def terms(self, name: str, w: Tensor) -> tuple[Tensor, ...] | None:
        """Return the tensors that eta is computed from: ``w``, values of a parameter's weights, first. None while eta is infinite."""
        return self.method.terms(name, w)

    def eta_of(self, *terms: Tensor) -> Tensor:
        """Return the eta that the form uses, of :meth:`terms`."""
        return self.method.eta(self.lam, *terms)

    def alpha_of(self, *terms: Tensor) -> Tensor:
        """Return the keep probability that the form uses, of :meth:`terms`."""
        eta = self.eta_of(*terms)
        return duality.alpha_of(eta, self.lam) if self.lam > 0 else torch.ones_like(eta)

    @property
    def oscillates(self) -> bool:
        """Whether the form's gradient carries weights over a zero at which the penalty would hold them."""
        return self.method.oscillates

    def is_at_rest(self, rho: Tensor | float, memory: float, *terms: Tensor) -> Tensor:
        """Return which weights are in the penalty's zero region, at a step size ``rho`` and a momentum of ``memory`` steps."""
        return self.method.is_at_rest(self.lam * self._clipping.mean, rho, memory, *terms)

    # -- of a parameter, or of all ---------------------------------------------------------------------------------------

    def eta(self, name: str, w: Tensor) -> Tensor:
        """Return the eta that the form uses for weights ``w`` of a parameter."""
        terms = self.terms(name, w)
        return torch.full_like(w, torch.inf) if terms is None else self._map([terms], self.eta_of)[0]

    def keep_probability(self, name: str, w: Tensor | None = None) -> Tensor:
        """Return alpha of each weight of a parameter, as this form uses it; ``w``: of other values for it, such as an average."""
        w = self._live(name) if w is None else w
        terms = self.terms(name, w.detach())
        return torch.ones_like(w) if terms is None else self._map([terms], self.alpha_of)[0]

    def _map(self, rows: Sequence[tuple[Tensor, ...]], function: Callable[..., Tensor], scalars: Sequence[float] = ()) -> list[Tensor]:
        return self.engine.map(list(zip(*rows, strict=True)), function, scalars, separable=self.penalty.separable)

    def cost(self, weights: list[Tensor]) -> float:
        """lam * Omega of ``weights``, which is logged as ``sparsity/penalty``."""
        return duality.penalty_value(self.penalty, weights, self.lam)

    def zeros(self, name: str, w: Tensor | None = None) -> Tensor:
        """Return which weights of a parameter (or other values ``w`` for it) count as zero: see :meth:`zeros_of`."""
        return self.zeros_of({name: self._live(name) if w is None else w})[name]

    def all_zeros(self) -> dict[str, Tensor]:
        """Return :meth:`zeros_of` every parameter's weights."""
        return self.zeros_of({name: self._live(name) for name in self.parameters})

    @torch.no_grad()
    def zeros_of(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return which of these values of parameters' weights count as zero.

        Once the support is frozen: all outside of it. Before: where alpha < ``tol``, or |w| <= ``threshold``, or where the
        optimiser's steps only carry the weight back and forth over a zero at which the penalty would hold it; and what was removed
        by rank.
        """
        if self.support is not None:
            return {name: ~self.support[name].to(w.device) for name, w in values.items()}
        kinds: dict[tuple[Any, ...], list[tuple[str, tuple[Tensor, ...]]]] = {}
        for name, w in values.items():
            terms = self.terms(name, w.detach())
            sizes, scalars = self._step_size(name)
            kind = (-1 if terms is None else len(terms), len(sizes), scalars)
            kinds.setdefault(kind, []).append((name, (*(terms or (w.detach(),)), *sizes)))
        found: dict[str, Tensor] = {}
        for (count, _, scalars), members in kinds.items():
            zeros = self._map([row for _, row in members], partial(self._is_zero, count), scalars)
            found |= zip((name for name, _ in members), zeros, strict=True)
        return {name: found[name] | ~self.cut[name].to(found[name].device) if name in self.cut else found[name] for name in values}

    def _is_zero(self, count: int, *row: Any) -> Tensor:
        """``row``: ``count`` terms (or w alone, where they are not known), then what a step size is made of and the memory, if any."""
        w, terms, size = row[0], row[: max(count, 0)], row[max(count, 1) :]
        below: Tensor = w == 0
        if count > 0:
            below = below | (self.alpha_of(*terms) < self.tol)
        if size:
            below = below | self.is_at_rest(steps.step_size(*size[:-1]), size[-1], *(terms or (w,)))
        return below if self.threshold is None else below | (w.abs() <= self.threshold)

    def _step_size(self, name: str) -> tuple[tuple[Tensor, ...], tuple[float, ...]]:
        """Return tensors and numbers that the zero region of a parameter's weights depends on; none where there is no such region."""
        if name not in self._places or self.lam <= 0 or not (self.penalty.separable and self.oscillates):
            return (), ()
        optimizer, number = self._places[name]
        state, group = self._step_sizes.of(optimizer, self.parameters[name], optimizer.param_groups[number])
        sizes, scalars = steps.step_size_terms(state, group, "auto")
        return sizes, (*scalars, steps.momentum_memory(group))

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

    @property
    def needs_step_sizes(self) -> bool:
        """Whether what counts as zero, or the form's own step, depends on the optimiser's step size."""
        return self.oscillates and self.penalty.separable

    def _live(self, name: str) -> Tensor:
        return self.parameters[name].detach() if self.attachment is None else self.attachment.live(name)

    def figures(self) -> dict[str, float]:
        """The values that are logged, as fractions in [0, 1] where they are shares."""
        return _report.figures(self)
