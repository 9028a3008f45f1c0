"""Parameters of a callback in the user's optimisers: a group of their own beside each group of the weights they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

_RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # of a group, as schedulers leave them there
_LISTS = ("base_lrs", "max_lrs", "min_lrs", "_last_lr", "lr_lambdas", "base_momentums", "max_momentums")  # of a scheduler, by group
_SCALED = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")


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


def reference(group: Mapping[str, Any]) -> float:
    """The rate of a group that its schedule is a share of: the highest where that is known, else what it starts at.

    0 where the optimiser finds its rate itself (``lr=None``).
    """
    return float(group.get("max_lr", group.get("initial_lr", group.get("lr"))) or 0.0)


def join(optimizer: Optimizer, number: int, parameters: list[Parameter], ratio: float, schedulers: Iterable[Any]) -> None:
    """Add ``parameters`` to ``optimizer`` with the settings of its group ``number``, at ``ratio`` times its rate, without weight decay."""
    added = _like(optimizer.param_groups[number], ratio)
    added |= {"name": f"{added['name']}, learned"} if "name" in added else {}
    if "param_names" in optimizer.param_groups[number]:
        parameters = [(f"learned.{len(optimizer.param_groups)}.{i}", one) for i, one in enumerate(parameters)]  # type: ignore[misc]
    optimizer.add_param_group({"params": parameters} | added)
    for scheduler in schedulers:
        _extend(scheduler, optimizer, number, ratio)


def follow(optimizer: Optimizer, parameters: Iterable[tuple[int, Parameter, float]]) -> None:
    """Before a step: a parameter's group takes rate (times a ratio) and momentum from a group, whoever changed them since the last."""
    homes = {id(one): group for group in optimizer.param_groups for one in group["params"]}
    for number, parameter, ratio in parameters:
        settings = _like(optimizer.param_groups[number], ratio)
        homes[id(parameter)].update({key: value for key, value in settings.items() if key != "name"})


def _like(group: Mapping[str, Any], ratio: float) -> dict[str, Any]:
    """A group's settings for learned parameters."""
    settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    settings |= {key: group[key] * ratio for key in _RATES if group.get(key) is not None}
    return settings | ({"weight_decay": 0.0} if "weight_decay" in group else {})


def leave(optimizer: Optimizer, own: set[int], schedulers: Iterable[Any]) -> dict[int, dict[str, Any]]:
    """Take the groups of the parameters with these ids out again; returns what the optimiser kept for them, by id."""
    numbers, count = _numbers(optimizer, own), len(optimizer.param_groups)
    left = [parameter for i in numbers for parameter in optimizer.param_groups[i]["params"]]
    for i in reversed(numbers):
        del optimizer.param_groups[i]
    for scheduler in schedulers:
        if numbers and getattr(scheduler, "optimizer", None) is optimizer:
            _shorten(vars(scheduler), numbers, count)
    return {id(parameter): dict(optimizer.state.pop(parameter, {})) for parameter in left}


def _numbers(optimizer: Optimizer, own: set[int]) -> list[int]:
    return [i for i, group in enumerate(optimizer.param_groups) if any(id(p) in own for p in group["params"])]


def _extend(scheduler: Any, optimizer: Optimizer, number: int, ratio: float) -> None:
    """A scheduler's entries for the new group: those of group ``number``, rates in proportion."""
    for inner in getattr(scheduler, "_schedulers", ()):  # SequentialLR, ChainedScheduler
        _extend(inner, optimizer, number, ratio)
    for name in _LISTS:
        entries = getattr(scheduler, name, None)
        if getattr(scheduler, "optimizer", None) is optimizer and isinstance(entries, list) and entries:
            entries.append(entries[number] * ratio if name in _SCALED else entries[number])


def strip(checkpoint: dict[str, Any], optimizers: list[Optimizer], schedulers: list[Any], own: set[int]) -> None:
    """Take the groups of the parameters with these ids out of a checkpoint: it then fits a run without the callback, too."""
    states = checkpoint.get("optimizer_states", [])
    for index, optimizer in enumerate(optimizers[: len(states)]):
        numbers = _numbers(optimizer, own)
        states[index] = _without(states[index], numbers) if numbers else states[index]
        for scheduler, state in zip(schedulers, checkpoint.get("lr_schedulers", []), strict=False):
            if numbers and getattr(scheduler, "optimizer", None) is optimizer:
                _shorten(state, numbers, len(optimizer.param_groups))


def _without(state: Mapping[str, Any], numbers: list[int]) -> dict[str, Any]:
    """An optimiser's state without some of its groups, its parameters numbered anew."""
    kept = [dict(group) for i, group in enumerate(state["param_groups"]) if i not in numbers]
    order = [old for group in kept for old in group["params"]]
    new = {old: i for i, old in enumerate(order)}
    for group in kept:
        group["params"] = [new[old] for old in group["params"]]
    return {**state, "state": {new[old]: value for old, value in state["state"].items() if old in new}, "param_groups": kept}


def _shorten(held: dict[str, Any], numbers: list[int], count: int) -> None:
    """A scheduler's attributes, or its state in a file, without its entries for some groups."""
    for inner in held.get("_schedulers", ()):
        _shorten(inner if isinstance(inner, dict) else vars(inner), numbers, count)
    for name in _LISTS:
        entries = held.get(name)
        if isinstance(entries, list) and len(entries) == count:
            held[name] = [entry for i, entry in enumerate(entries) if i not in numbers]


def moments(optimizers: Iterable[Optimizer], parameter: Parameter) -> dict[str, Any]:
    """What an optimiser keeps for a parameter."""
    return next((dict(one.state[parameter]) for one in optimizers if parameter in one.state), {})


def give_back(optimizer: Optimizer, parameter: Parameter, kept: Mapping[str, Any]) -> None:
    """Put :func:`moments` back, on the parameter's device; step counts stay where the optimiser wants them."""
    group = next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
    on_device = bool(group.get("fused") or group.get("capturable"))
    for key, value in kept.items():
        moved = isinstance(value, Tensor) and (key != "step" or on_device)
        optimizer.state[parameter][key] = value.clone().to(parameter.device) if moved else _copied(value)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
