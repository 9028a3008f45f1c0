"""Train parameters outside of the module with an optimiser of the class and settings of the weights' optimiser.

The user's optimiser, its groups and its schedulers are not changed: the second optimiser copies rate and momentum from the groups
before each step, whoever changed them.
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

_RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # entries of a group that schedulers set
_SCALING = ("grad_scale", "found_inf")  # attributes that a GradScaler sets on a fused optimiser during a step


class Share(NamedTuple):
    """Parameters that follow group ``number`` of the user's optimiser at ``ratio`` times its rate, and the ``weights`` they belong to."""

    number: int
    ratio: float
    weights: list[Parameter]
    parameters: list[Parameter]


class SecondOptimizer:
    """Optimises some parameters like the user's ``first``, with one optimiser for each one needed that ``first`` holds."""

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
        """Return the param groups, as the next step uses them."""
        return [group for part, _ in self._parts for group in part.param_groups]

    def follow(self) -> None:
        """Copy rate and momentum from the user's groups, before they step."""
        for part, shares in self._parts:
            of = {id(parameter): share for share in shares for parameter in share.parameters}
            for group in part.param_groups:  # the optimiser's class may have split them
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
        """Clear the gradients."""
        for group in self.groups:
            for parameter in group["params"]:
                parameter.grad = None

    def moments(self, parameter: Parameter) -> dict[str, Any]:
        """Return the optimiser's state of a parameter."""
        return next((dict(part.state[parameter]) for part, _ in self._parts if parameter in part.state), {})

    def restore_moments(self, parameter: Parameter, kept: Mapping[str, Any]) -> None:
        """Restore :meth:`moments`, on the parameter's device; step counts stay on the device that the optimiser needs."""
        for part, _ in self._parts:
            for group in part.param_groups:
                if kept and any(one is parameter for one in group["params"]):
                    part.state[parameter] = dict(_moved(kept, parameter, bool(group.get("fused") or group.get("capturable"))))


def _closure(optimizer: Optimizer) -> tuple[Any, ...]:
    """Return a closure without a loss, for an optimiser whose ``step`` requires one."""
    needed = [one for one in inspect.signature(optimizer.step).parameters.values() if one.default is one.empty]
    return ((lambda: None),) if any(one.kind is one.POSITIONAL_OR_KEYWORD for one in needed) else ()


def reference(group: Mapping[str, Any]) -> float:
    """Return the rate that a group's schedule scales: the highest if it is known, else the initial one; 0 for none."""
    return float(group.get("max_lr", group.get("initial_lr", group.get("lr"))) or 0.0)


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
        elif name not in ("step", "zero_grad", *_SCALING):
            setattr(made, name, copy.copy(value) if isinstance(value, (dict, list, set)) else value)
    made.state, made.param_groups = defaultdict(dict), groups
    return made


def _settings(group: Mapping[str, Any], ratio: float) -> dict[str, Any]:
    """Return a group's settings for other parameters: without weight decay, at ``ratio`` times its rate.

    Tensors are copied, because an optimiser may keep running sums in its groups and update them in place (Prodigy).
    """
    settings = {key: value for key, value in group.items() if key not in ("params", "param_names", "name")}
    settings = {key: value.clone() if isinstance(value, Tensor) else value for key, value in settings.items()}
    settings |= {key: group[key] * ratio for key in _RATES if group.get(key) is not None}
    return settings | ({"weight_decay": 0.0} if "weight_decay" in group else {})


def _moved(kept: Mapping[str, Any], parameter: Tensor, steps_too: bool) -> Iterator[tuple[str, Any]]:
    for key, value in kept.items():
        if isinstance(value, Tensor):
            yield key, value.clone().to(parameter.device) if key != "step" or steps_too else value.clone()
        else:
            yield key, copy.copy(value)


def overflowed(parameters: Iterable[Parameter]) -> bool:
    """Return True if a gradient of these parameters has a value that is not finite."""
    return any(p.grad is not None and not bool(torch.isfinite(p.grad).all()) for p in parameters)
