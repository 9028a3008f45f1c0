"""Measure the running means of squared gradients that a score ranks by, of single weights or of the sizes of groups."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse import elementwise
from lightning_sparse.grouped import Groups, ratio, wide
from lightning_sparse.scores import Score
from lightning_sparse.weights import WeightStore


class GradientSquares:
    """Keeps E g^2 by the name of a parameter, or of the leader of groups.

    The gradient in the size r_g of a group is sum_j w_j g_j / r_g. So r_g^2 times its mean square is the group's
    F_g = E (d loss / d s_g)^2, for a factor s_g on its weights. The means start at 0, which does not change a ranking.

    Args:
        score: says whether they are needed, and the weight ``decay`` of the past in a step (0.99 if it has none).
        weights: the selected weights.
    """

    def __init__(self, score: Score, weights: WeightStore) -> None:
        self.score, self.weights = score, weights
        self.means: dict[str, Tensor] = {}

    def of(self, name: str) -> Tensor | None:
        """Return the whole means of a parameter or leader; None if they are unknown or the score needs none."""
        return elementwise.full_tensor(self.means[name]) if self.score.needs_squares and name in self.means else None

    @torch.no_grad()
    def update(self, optimizer: Optimizer, groups: Groups | None, scale: float = 1.0) -> None:
        """Update the means before a step of ``optimizer``, from gradients that are ``scale`` times those of the loss."""
        grads = {name: parameter.grad for name, parameter, _ in self.weights.members(optimizer) if parameter.grad is not None}
        if groups is not None:
            led = [leader for leader, (first, *_) in groups.parts.items() if first.name in grads]
            grads = {leader: self._in_sizes(groups, leader, grads) for leader in led}
        decay = getattr(self.score, "decay", 0.99)
        for name, grad in grads.items():
            if name not in self.means:
                self.means[name] = torch.zeros_like(self.weights.live(name) if groups is None else grad)
            mean, own = (elementwise.local_part(part) for part in (self.means[name], grad))
            mean.mul_(decay).addcmul_(own.to(mean), own.to(mean), value=(1 - decay) / scale**2)

    def _in_sizes(self, groups: Groups, leader: str, grads: Mapping[str, Tensor]) -> Tensor:
        """Return the gradient in the sizes of a leader's groups; 0 where a size is 0."""
        parts = [(part, self.weights.live(part.name), grads[part.name]) for part in groups.parts[leader] if part.name in grads]
        sums = [part.pool(wide(w) * wide(grad)) for part, w, grad in parts]
        along = sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)
        return elementwise.map_shards(ratio, along, groups.size(leader, self.weights.live))

    def restore(self, means: Mapping[str, Tensor], groups: Groups | None) -> None:
        """Continue the means of a file; those of other weights or groups start anew."""
        live = self.weights.live
        known = (
            {name: live(name) for name in self.weights.parameters}
            if groups is None
            else {one: groups.size(one, live) for one in groups.parts}
        )
        found = {name: like for name, like in known.items() if name in means and means[name].shape == like.shape}
        parts = {name: elementwise.cut_like(means[name].to(like.device), like) for name, like in found.items()}
        self.means = {name: elementwise.shard_like(part, found[name]) for name, part in parts.items()}
