"""Group the weights within one parameter, also where FSDP2 splits it by rows over processes and cuts no group.

Each process then pools its own rows; the values of the groups are split over processes as the rows are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_sparse import elementwise
from lightning_sparse.structure import Structure


@dataclass(frozen=True)
class Part:
    """The weights of one parameter in the groups of a leader.

    Args:
        name: the parameter.
        pool: sums a tensor of its shape over each group.
        spread: returns the value of each weight's group, broadcast to its second argument; the third is for weights in no group.
        is_masked: masks multiply these weights; else they only count for the size.
    """

    name: str
    pool: Callable[[Tensor], Tensor]
    spread: Callable[[Tensor, Tensor, float], Tensor]
    is_masked: bool = True


def part_of(structure: Structure, name: str) -> Part:
    """Return a parameter's groups within itself."""

    def pool(x: Tensor) -> Tensor:
        if not elementwise.is_sharded(x):
            return structure.pool(x)
        own, shape = elementwise.local_part(x), structure.pool(torch.empty(x.shape, device="meta")).shape
        return elementwise.shard_like(structure.pool(own) if len(own) else own.new_zeros(0, *shape[1:]), x, shape)

    def spread(value: Tensor, like: Tensor, _: float) -> Tensor:
        if not elementwise.is_sharded(like):
            return structure.spread(value, like)
        own, values = elementwise.local_part(like), elementwise.local_part(value)
        return elementwise.shard_like(structure.spread(values, own).expand_as(own) if len(own) else values.new_zeros(own.shape), like)

    return Part(name, pool, spread)


def check_whole(structure: Structure, name: str, parameter: Any) -> None:
    """Raise ValueError, with the reason, if processes that share a parameter would hold parts of one group."""
    if not elementwise.is_sharded(parameter):
        return
    places, use = parameter.placements, "use DDPStrategy, or structure=Element()"
    splits = [number for number, place in enumerate(places) if not place.is_replicate()]
    if not splits:
        return
    if len(splits) > 1 or not places[splits[0]].is_shard(0):
        raise ValueError(f"{structure!r} works on weights that are split by rows alone, but {name!r} is split as {places}; {use}")
    processes = parameter.device_mesh.size(splits[0])
    if structure.height is None:
        raise ValueError(
            f"a group of {structure!r} may have weights in all rows of {name!r}, and FSDP2 gives each of {processes} processes some "
            f"of the rows; use Rows(), whose groups stay whole, or {use}"
        )
    rows = -(-len(parameter) // processes)  # of each process but the last ones
    if rows < len(parameter) and rows % structure.height:
        raise ValueError(
            f"a group of {structure!r} has {structure.height} rows, and FSDP2 gives each of {processes} processes {rows} rows of {name!r}, "
            f"which cuts groups; choose a height that divides {rows}, or {use}"
        )
