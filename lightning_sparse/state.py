"""Check the entries of a checkpoint's state before any of it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def entry(state: Mapping[str, Any], name: str, holds: Callable[[Any], bool], wanted: str) -> None:
    """Raise ValueError unless ``state[name]`` exists and ``holds`` is true of it."""
    if name not in state:
        raise ValueError(f"it lacks {name!r}; it has {short(sorted(map(str, state)))}")
    if not holds(state[name]):
        raise ValueError(f"{name!r} must be {wanted}, got {short(state[name])}")


def short(value: Any) -> str:
    """Describe a value in a few words, a tensor by its type and shape."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} with shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def is_count(value: Any) -> bool:
    """Return True for a whole number >= 0."""
    return is_whole(value) and value >= 0


def is_whole(value: Any) -> bool:
    """Return True for a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_flag(value: Any) -> bool:
    """Return True for a boolean."""
    return isinstance(value, bool)


def is_factor(value: Any) -> bool:
    """Return True for a finite float > 0."""
    return isinstance(value, float) and 0 < value < float("inf")


def is_share(value: Any) -> bool:
    """Return True for a float in [0, 1]."""
    return isinstance(value, float) and 0 <= value <= 1


def are_names(value: Any) -> bool:
    """Return True for a list of strings."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def by_name(value: Any) -> bool:
    """Return True for a dict with strings as keys."""
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def are_tensors(value: Any) -> bool:
    """Return True for a dict of finite floating tensors by name."""
    return by_name(value) and all(
        isinstance(part, Tensor) and part.is_floating_point() and bool(torch.isfinite(part).all()) for part in value.values()
    )


def are_masks(value: Any) -> bool:
    """Return True for a dict of boolean tensors by name."""
    return by_name(value) and all(isinstance(mask, Tensor) and mask.dtype == torch.bool for mask in value.values())


def check_curvature(state: Any, parameters: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless ``state`` is that of curvature estimates for these parameters (of any, where there are none yet)."""
    if not isinstance(state, dict) or not all(isinstance(state.get(key), dict) for key in ("mean", "weight")):
        raise ValueError(f"the checkpoint's curvature must be a dict of 'mean' and 'weight' by parameter name, got {state!r:.80}")
    if state["mean"].keys() != state["weight"].keys() or (parameters and not state["mean"].keys() <= parameters.keys()):
        raise ValueError(f"the checkpoint's curvature is of other parameters: {sorted(map(str, state['mean']))[:5]}")
    missed = state.get("missed", [])
    if not isinstance(missed, list) or not all(isinstance(name, str) for name in missed):
        raise ValueError(f"the checkpoint's curvature has a damaged 'missed', a list of names, got {missed!r:.80}")
    updates = state.get("updates", {})
    if not isinstance(updates, dict) or not all(isinstance(count, int) and count >= 0 for count in updates.values()):
        raise ValueError(f"the checkpoint's curvature has damaged 'updates', whole numbers by parameter name, got {updates!r:.80}")
    for name, mean in state["mean"].items():
        if not (_is_estimate(mean, parameters.get(name)) and _is_share(state["weight"][name])):
            raise ValueError(f"the checkpoint's curvature of {name!r} is damaged; resume from another file")


def _is_estimate(mean: Any, parameter: Tensor | None) -> bool:
    """Finite and >= 0, shaped as the parameter is."""
    if not (isinstance(mean, Tensor) and mean.is_floating_point()):
        return False
    return (parameter is None or mean.shape == parameter.shape) and bool(((mean >= 0) & mean.isfinite()).all())


def _is_share(weight: Any) -> bool:
    return isinstance(weight, float) and 0 < weight < 1 + 1e-6  # it tends to 1, up to rounding
