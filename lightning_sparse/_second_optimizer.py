"""Trains parameters that belong to no module by an optimiser of the class and settings of the one that trains the weights.

The user's optimiser, its groups and the schedulers that count them are left alone: the second optimiser takes rate and
momentum from them before each step, whoever changed them.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

_RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # of a group, as schedulers leave them there
_SCALING = ("grad_scale", "found_inf")  # what a GradScaler leaves at a fused optimiser for the time of a step


class Share(NamedTuple):
    """Parameters that follow group ``number`` of the user's optimiser at ``ratio`` times its rate; ``weights`` are what they belong to."""

    number: int
    ratio: float
    weights: list[Parameter]
    parameters: list[Parameter]


class SecondOptimizer:
    """The optimiser of some parameters, like the user's ``first``; one for each optimiser that ``first`` holds and that is needed."""

    def __init__(self, first: Optimizer, shares: Iterable[Share]) -> None:
        self.first = first
        found: dict[int, tuple[Optimizer, list[Share]]] = {}
        for share in shares:
            inner = innermost(first, share.weights[0])
            found.setdefault(id(inner), (inner, []))[1].append(share)
        self._parts = [(like(inner, [self._group(share) for share in of_it]), of_it) for inner, of_it in found.values()]

    def _group(self, share: Share) -> dict[str, Any]:
        return _settings(self.first.param_groups[share.number], share.ratio) | {"params": share.parameters}

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The groups of the parameters, as the next step uses them."""
        return [group for part, _ in self._parts for group in part.param_groups]

    def follow(self) -> None:
        """Take rate and momentum from the user's groups, before they step."""
        for part, shares in self._parts:
            of = {id(parameter): share for share in shares for parameter in share.parameters}
            for group in part.param_groups:  # which a class may have divided
                share = of[id(group["params"][0])]
                group.update(_settings(self.first.param_groups[share.number], share.ratio))

    def step(self) -> None:
        """Step once, under the scale of a GradScaler if the user's optimiser was given one for this step."""
        scaling = {name: vars(self.first)[name] for name in _SCALING if name in vars(self.first)}
        for part, _ in self._parts:
            vars(part).update(scaling)
            part.step(*_closure(part))
            for name in scaling:
                delattr(part, name)

    def clear(self, *_: Any) -> None:
        """Forget the gradients."""
        for group in self.groups:
            for parameter in group["params"]:
                parameter.grad = None

    def moments(self, parameter: Parameter) -> dict[str, Any]:
        """What the optimiser keeps for a parameter."""
        return next((dict(part.state[parameter]) for part, _ in self._parts if parameter in part.state), {})

    def give_back(self, parameter: Parameter, kept: Mapping[str, Any]) -> None:
        """Put :meth:`moments` back, on the parameter's device; step counts stay where the optimiser wants them."""
        for part, _ in self._parts:
            for group in part.param_groups:
                if kept and any(one is parameter for one in group["params"]):
                    part.state[parameter] = dict(_moved(kept, parameter, bool(group.get("fused") or group.get("capturable"))))


def _closure(optimizer: Optimizer) -> tuple[Any, ...]:
    """A closure without a loss, for an optimiser whose ``step`` cannot be called without one."""
    needed = [one for one in inspect.signature(optimizer.step).parameters.values() if one.default is one.empty]
    return ((lambda: None),) if any(one.kind is one.POSITIONAL_OR_KEYWORD for one in needed) else ()


def reference(group: Mapping[str, Any]) -> float:
    """The rate of a group that its schedule is a share of: the highest where that is known, else what it starts at; 0 for none."""
    return float(group.get("max_lr", group.get("initial_lr", group.get("lr"))) or 0.0)


def innermost(optimizer: Optimizer, weight: Tensor) -> Optimizer:
    """The optimiser that updates ``weight`` in the end: ``optimizer``, or one that it holds."""
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
    """An optimiser of the same class and settings for ``groups``; its state is its own."""
    _, *names = inspect.signature(type(optimizer)).parameters
    known = vars(optimizer) | optimizer.defaults
    try:
        return type(optimizer)(groups, **{name: known[name] for name in names if name in known})
    except Exception:  # it is made in a way that is not known: as a copy without state
        return _copied(optimizer, groups)


def _copied(optimizer: Optimizer, groups: list[dict[str, Any]]) -> Optimizer:
    made: Optimizer = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        if name.startswith("_optimizer_") and name.endswith("_hooks"):
            setattr(made, name, OrderedDict())
        elif name not in ("step", "zero_grad", *_SCALING):
            setattr(made, name, copy.copy(value) if isinstance(value, (dict, list, set)) else value)
    made.state, made.param_groups = defaultdict(dict), groups
    return made


def _settings(group: Mapping[str, Any], ratio: float) -> dict[str, Any]:
    """A group's settings for other parameters: without weight decay, at ``ratio`` times its rate."""
    settings = {key: value for key, value in group.items() if key not in ("params", "param_names", "name")}
    settings |= {key: group[key] * ratio for key in _RATES if group.get(key) is not None}
    return settings | ({"weight_decay": 0.0} if "weight_decay" in group else {})


def _moved(kept: Mapping[str, Any], parameter: Tensor, steps_too: bool) -> Iterator[tuple[str, Any]]:
    for key, value in kept.items():
        if isinstance(value, Tensor):
            yield key, value.clone().to(parameter.device) if key != "step" or steps_too else value.clone()
        else:
            yield key, copy.copy(value)


def overflowed(parameters: Iterable[Parameter]) -> bool:
    """Some gradient of these holds a value that is not finite."""
    return any(p.grad is not None and not bool(torch.isfinite(p.grad).all()) for p in parameters)
