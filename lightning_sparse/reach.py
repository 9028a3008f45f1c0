"""Count how many of the selected weights the groups of a structure can make zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sparse import counts, elementwise
from lightning_sparse.support import Support


@dataclass(frozen=True)
class Reach:
    """The largest number of zeros that groups can make.

    Args:
        zeros: weights that can be zero at once, with those that are held at zero.
        size: all selected weights; tied ones count once.
        outside: selected parameters that have no weight in any group.
        inside: selected weights of the other parameters.
        elsewhere: those of ``outside`` that have weights in removable groups of another kind: heads, or channels.
    """

    zeros: int
    size: int
    outside: tuple[str, ...]
    inside: int
    elsewhere: tuple[str, ...]

    @property
    def share(self) -> float:
        """Return the largest share of zeros."""
        return self.zeros / max(self.size, 1)

    def suffices(self, target: float) -> bool:
        """Return True if the groups can make the share ``target`` zero, up to a weight."""
        return self.zeros >= round(target * self.size)


@torch.no_grad()
def of(support: Support) -> Reach | None:
    """Return what the groups of a run can reach; None for single weights. A collective for weights that are split over processes."""
    groups = support.groups
    if groups is None:
        return None
    # plain tensors of the whole shapes, because of split weights each process has only a part
    whole = {name: torch.zeros(w.shape, dtype=torch.bool, device=w.device) for name, w in support.weights.parameters.items()}
    gone, sizes = {}, {}
    for leader in groups.leaders_of(whole):
        sizes[leader] = count = groups.total(leader, whole.__getitem__, lambda w, _: torch.ones_like(w))
        smallest = count.reshape(-1).argsort(stable=True)[: groups.staying(count.numel(), support.least)]
        gone[leader] = torch.ones_like(count, dtype=torch.bool).reshape(-1).index_fill_(0, smallest, False).reshape(count.shape)
    masks: dict[str, Tensor] = groups.zeros(gone, whole, sizes)
    for name, held in support.held.items():
        if name in masks:
            masks[name] |= ~elementwise.full_tensor(held).to(masks[name].device)
    found = {name: (int(masks[name].sum()), masks[name].numel()) for name in counts.distinct(support.weights.parameters)}
    inside = {name for leader in gone for name in groups.names(leader)}
    outside = tuple(name for name in found if name not in inside)
    zeros, size = (sum(column) for column in zip(*found.values(), strict=True)) if found else (0, 0)
    elsewhere = tuple(name for name in outside if name in groups.elsewhere)
    return Reach(zeros, size, outside, sum(size for name, (_, size) in found.items() if name in inside), elsewhere)


def missing(support: Support, target: float) -> float | None:
    """Return the share of zeros if it is below ``target`` by more than a weight a parameter; else None. A collective, as above."""
    found = counts.count_zeros(support.weights.parameters, support.all_zeros())
    zeros, size = (sum(column) for column in zip(*found.values(), strict=True)) if found else (0, 0)
    return counts.share(found) if zeros + len(found) < target * size else None
