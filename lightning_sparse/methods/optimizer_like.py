"""Make an optimiser of the class and settings of another, for other parameters."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

SCALING = ("grad_scale", "found_inf")  # attributes that a GradScaler sets on a fused optimiser during a step


def innermost(optimizer: Optimizer, weight: Tensor) -> Optimizer:
    """Return the optimiser that updates ``weight`` in the end: ``optimizer``, or one that it holds."""
    held = [one for one in _held(vars(optimizer).values()) if one is not optimizer]
    owners = [one for one in held if any(p is weight for group in one.param_groups for p in group["params"])]
    return innermost(owners[0], weight) if owners else optimizer


def _held(values: Iterable[Any]) -> Iterator[Optimizer]:
    for value in values:
        if isinstance(value, Optimizer):
            yield value
        elif isinstance(value, (list, tuple, dict)):
            yield from _held(value.values() if isinstance(value, dict) else [one for one in value if isinstance(one, Optimizer)])


def like(optimizer: Optimizer, groups: list[dict[str, Any]]) -> Optimizer:
    """Return an optimiser of the same class and settings for ``groups``, with its own state."""
    _, *names = inspect.signature(type(optimizer)).parameters
    known = vars(optimizer) | optimizer.defaults
    try:
        return type(optimizer)(groups, **{name: known[name] for name in names if name in known})
    except Exception:  # because its constructor is not known: make a copy without state
        return _copied(optimizer, groups)


def _copied(optimizer: Optimizer, groups: list[dict[str, Any]]) -> Optimizer:
    made: Optimizer = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        if name.startswith("_optimizer_") and name.endswith("_hooks"):
            setattr(made, name, OrderedDict())
        elif name not in ("step", "zero_grad", *SCALING):
            setattr(made, name, copy.copy(value) if isinstance(value, (dict, list, set)) else value)
    made.state, made.param_groups = defaultdict(dict), groups
    return made


def moved(kept: Mapping[str, Any], parameter: Tensor, steps_too: bool) -> Iterator[tuple[str, Any]]:
    for key, value in kept.items():
        if isinstance(value, Tensor):
            yield key, value.clone().to(parameter.device) if key != "step" or steps_too else value.clone()
        else:
            yield key, copy.copy(value)
