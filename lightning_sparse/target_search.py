"""Search for the lam that brings a target share of zeros: when it is solved for, within which bound, and what is removed by rank."""

from __future__ import annotations

import math

import torch
from torch.optim import Optimizer

from lightning_sparse import elementwise
from lightning_sparse.grouped import Groups
from lightning_sparse.schedules import TargetSparsity, rounds
from lightning_sparse.support import Support

# largest gradient of the penalty in a search for a target, as a share of the loss's gradient. Where the scale of a tensor does not
# matter, as before a batch norm, shrinking costs the weights that stay nothing; elsewhere it does, and more than removal by rank.
BOUND, BOUND_IF_FREE = 0.003, 0.05
FREE = 0.05  # a tensor's scale does not matter if sqrt(n) times the cosine of weights and gradients is at most this


class TargetSearch:
    """Moves lam, and where that is not enough the support, towards the target of a run.

    The target itself, its ramp and the solver of lam are ``support.strength.target`` (:class:`lightning_sparse.schedules.TargetSparsity`).

    Args:
        support: decides what is zero, and removes weights by rank.
    """

    def __init__(self, support: Support) -> None:
        self.support, self.strength = support, support.strength

    @property
    def _groups(self) -> Groups | None:
        """Return the groups that the penalty acts on; None for single weights."""
        return self.support.groups if self.support.method.takes_groups else None

    def measures(self, freeze: float) -> bool:
        """Return True if gradients are measured in the next step: before lam is solved for, and first of all where it is given."""
        return self.is_due(freeze, ahead=1) or self._begins

    @property
    def _begins(self) -> bool:
        """Return True before the first step of a search from a given lam."""
        target = self.strength.target
        return target is not None and target.is_given and self.support.method.solvable and not self.strength.step

    def is_due(self, freeze: float, ahead: int = 0) -> bool:
        """Return True if lam is solved for after this step, or the one ``ahead`` of it.

        The search ends where the last share ``freeze`` of the run begins (0: the default's). See
        :func:`lightning_sparse.schedules.rounds`.
        """
        step, way = self.strength.step + ahead, self.strength.total * (1 - self.strength.frozen_share(freeze))
        points = rounds(way)
        return self.strength.target is not None and not self.support.is_frozen and step * points // way != (step - 1) * points // way

    @torch.no_grad()
    def follow(self, freeze: float) -> bool:
        """Solve for lam where that is due, and remove missing zeros by rank; return True once the ramp has reached the target."""
        target, support = self.strength.target, self.support
        if target is None or not self.is_due(freeze):
            return False
        zeros = support.share_of_zeros() if target.ramp or target.is_given else self._zeros_without_lam(target)
        wanted = target.advance(zeros, self.strength.step / (self.strength.total * (1 - self.strength.frozen_share(freeze))))
        if support.method.solvable:
            target.solve(support.share_of_zeros, self.largest_lam())
            zeros = support.share_of_zeros()
        if zeros < wanted:
            support.prune_to(wanted)
            target.ranked += support.share_of_zeros() - zeros
        return target.target_reached()

    def _zeros_without_lam(self, target: TargetSparsity) -> float:
        """Return the share of zeros at lam = 0, where the ramp begins: the lam of the first steps has not been solved for."""
        lam, target.log_lam = target.log_lam, -math.inf
        try:
            return self.support.share_of_zeros()
        finally:
            target.log_lam = lam

    @torch.no_grad()
    def measure_gradients(self, optimizer: Optimizer, scale: float = 1.0) -> None:
        """Measure the loss's gradients before a step of ``optimizer``; they are ``scale`` times as large.

        Measured are their mean square, and the share of the weights in tensors whose scale does not matter, as before a batch norm:
        there the gradient g is orthogonal to w. Elsewhere the cosine of w and g is of the order of 1 / sqrt(n) at least.
        """
        weights = self.support.weights
        members = [(name, p) for name, p, _ in weights.members(optimizer) if p.grad is not None and p.numel()]
        if self._groups is not None:  # those that the penalty acts on
            members = [(name, p) for name, p in members if self._groups.of(name)]
        if not members or self.strength.target is None:
            return
        rows = []
        for name, parameter in members:
            g, w = (elementwise.local_part(part).float() for part in (parameter.grad, weights.live(name)))
            rows.append(elementwise.sum_shards(torch.stack([(g * g).sum(), (w * w).sum(), (g * w).sum()]), parameter).cpu())
        squares, norms, products = torch.stack(rows).double().unbind(1)
        sizes = torch.tensor([float(parameter.numel()) for _, parameter in members], dtype=torch.float64)
        free = products.abs() * sizes.sqrt() <= FREE * (squares * norms).sqrt()
        self.strength.target.observe_gradients(float(squares.sum() / sizes.sum()) / scale**2, float(sizes[free].sum() / sizes.sum()))
        if self._begins:
            self.strength.target.begin_below(self.largest_lam())

    def largest_lam(self) -> float:
        """Return the lam at which the penalty's gradients are as large as they may be beside the loss's; inf if unknown.

        Their ratio, of root mean squares, is BOUND where the scale of all weights matters, BOUND_IF_FREE where that of none does.
        """
        groups, known, penalty = self._groups, self.support.weights.live, self.support.method.penalty
        live = self.support.weights.all_live() if groups is None else {leader: groups.size(leader, known) for leader in groups.parts}
        slopes = self.support.engine.map([[w.detach() for w in live.values()]], penalty.gradient, separable=penalty.separable)
        square = count = 0.0
        for slope, (name, w) in zip(slopes, live.items(), strict=True):
            if groups is not None:  # each of a group's weights has the slope of its size, in the mean square
                members, size, slope = map(elementwise.local_part, (groups.count(name, known), w, slope))
                weights = members * (size != 0)
                square += float(elementwise.sum_shards((weights * slope * slope).sum(), w))
                count += float(elementwise.sum_shards(weights.sum(), w))
                continue
            alive = elementwise.local_part(w) != 0
            square += float(elementwise.sum_shards(elementwise.local_part(slope)[alive].float().square().sum(), w))
            count += float(elementwise.sum_shards(alive.sum(), w))
        target = self.strength.target
        if target is None or not target.gradient or not math.isfinite(square) or square <= 0:
            return math.inf
        bound: float = BOUND * (BOUND_IF_FREE / BOUND) ** target.free
        return bound * math.sqrt(target.gradient * count / square)
