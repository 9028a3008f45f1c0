"""Choose groups to remove: scores of groups from gradients, and as many of the lowest per multiply-add as a target asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse import coupling, surgery
from lightning_sparse.coupling import Group
from lightning_sparse.shrinking.report import count_multiply_adds
from lightning_sparse.shrinking.shrink import shrink


class GroupScores:
    """Estimate F_g = E (d loss / d s_g)^2, s_g a factor on what group g sends to its readers, at s = 1.

    d loss / d s_g = sum over the group's columns of w * d loss / d w: call :meth:`update` after each backward pass. This is the Taylor
    importance of structured pruning (Molchanov et al., 2019, arXiv 1906.10771), with the mean over batches for the expectation.
    Groups without columns are scored by their rows. Frozen weights count as 0.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = [group for group in groups if group.exact]
        self.total = torch.zeros(len(self.groups), dtype=torch.float64)
        self.batches = 0
        self.places: dict[tuple[str, int], tuple[list[int], list[int]]] = {}
        for number, group in enumerate(self.groups):
            for entry in group.parameters("consumer") or group.parameters("producer"):
                indices, numbers = self.places.setdefault((entry.name, entry.dim), ([], []))
                indices += entry.indices
                numbers += [number] * len(entry.indices)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Add the gradients of one batch."""
        parameters = dict(module.named_parameters(remove_duplicate=False))
        slopes = torch.zeros_like(self.total)
        for (name, dim), (indices, numbers) in self.places.items():
            weight = parameters[name]
            if weight.grad is not None:
                sums = (weight * weight.grad).movedim(dim, 0).flatten(1).sum(1).double().cpu()
                slopes.index_add_(0, torch.tensor(numbers), sums[indices])
        self.total += slopes.square()
        self.batches += 1

    def values(self) -> dict[str, float]:
        """Return F_g by the name of the group. Raises ValueError before the first update."""
        if not self.batches:
            raise ValueError("no gradients were recorded: call update(module) after a backward pass")
        mean: Tensor = self.total / self.batches
        return dict(zip((group.name for group in self.groups), mean.tolist(), strict=True))


def choose(
    module: nn.Module, inputs: Any, groups: Sequence[Group], scores: Mapping[str, float], multiply_adds: int, round_to: int = 8
) -> list[Group]:
    """Return the fewest groups, lowest score per multiply-add first, without which one call takes at most ``multiply_adds``.

    Each axis keeps a multiple of ``round_to`` (heads: of 1), at least one. Returns as many as can go where the target is out of reach.
    """
    axes: dict[str, list[Group]] = {}
    for group in groups:
        if group.exact:
            axes.setdefault(group.axis, []).append(group)
    whole = count_multiply_adds(module, inputs)
    costs = {axis: max(whole - count_multiply_adds(_without(module, members[:1]), inputs), 1) for axis, members in axes.items()}
    order = sorted((group for members in axes.values() for group in members), key=lambda g: scores[g.name] / costs[g.axis])

    def removed(count: int) -> list[Group]:
        lowest = {group.name for group in order[:count]}
        chosen = []
        for members in axes.values():
            ranked = sorted(members, key=lambda g: scores[g.name])
            unit = 1 if members[0].kind == "head" else round_to
            stay = -(-sum(group.name not in lowest for group in members) // unit) * unit
            chosen += ranked[: max(len(members) - max(stay, min(unit, len(members))), 0)]
        return chosen

    low, high = 0, len(order)
    while low < high:  # the number of groups is searched by halving, because axes share multiply-adds
        middle = (low + high) // 2
        if count_multiply_adds(_without(module, removed(middle)), inputs) <= multiply_adds:
            high = middle
        else:
            low = middle + 1
    return removed(low)


def remove(module: nn.Module, inputs: Any, groups: Sequence[Group], chosen: Sequence[Group], round_to: int = 8) -> Any:
    """Set the chosen groups of a copy to zero and shrink it; the other groups stay. The copy's outputs are checked as in ``shrink``."""
    zeroed = surgery.duplicate(module)
    surgery.zero_(zeroed, coupling.indices(chosen))
    return shrink(zeroed, inputs, round_to, groups=groups)


def share_of(module: nn.Module, groups: Sequence[Group], chosen: Sequence[Group]) -> float:
    """Return the share of zeros among the parameters that the ``groups`` have weights in, if the ``chosen`` ones are zero.

    It is the ``target_sparsity`` at which a callback with a structure of these groups makes as many weights zero.
    """
    names = {entry.name for group in groups if group.exact for entry in group.entries}
    gone, total, left = coupling.indices(chosen), 0, 0
    for name, parameter in module.named_parameters():
        if name in names:
            stays = torch.ones(parameter.shape, dtype=torch.bool)
            for dim, indices in gone.get(name, {}).items():
                stays.index_fill_(dim, torch.tensor(sorted(indices)), False)
            total, left = total + stays.numel(), left + int(stays.sum())
    if not total:
        raise ValueError("none of the groups can be removed exactly, so they have no weights to count")
    return 1 - left / total


def _without(module: nn.Module, removed: Sequence[Group]) -> nn.Module:
    smaller: nn.Module = surgery.duplicate(module, share=True)
    surgery.cut_(smaller, *coupling.kept(module, removed))
    return smaller
