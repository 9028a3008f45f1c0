"""Which parameters of a callback an optimiser updates, and in which of its groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn import Parameter
from torch.optim import Optimizer

Member = tuple[str, Parameter, dict[str, Any]]  # name, parameter, group
Members = tuple[tuple[Any, ...], list[Member]]  # under a stamp that changes with them


def members(parameters: Mapping[str, Parameter], optimizer: Optimizer, known: Members | None) -> Members:
    """Those of ``parameters`` that ``optimizer`` updates; ``known`` as it is, unless groups or their lengths have changed since."""
    stamp = (len(parameters), *((id(group), len(group["params"])) for group in optimizer.param_groups))
    if known is not None and known[0] == stamp:
        return known
    names = {id(parameter): name for name, parameter in parameters.items()}
    # these hold the groups, so that no group's id comes up again while they are known
    return stamp, [(names[id(p)], p, group) for group in optimizer.param_groups for p in group["params"] if id(p) in names]
