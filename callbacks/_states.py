"""What a checkpoint holds for a callback, checked whole before any of it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_sparse import step_sizes, target

if TYPE_CHECKING:
    from lightning_sparse.callbacks._form import Form


def check(callback: Form, state: Any) -> None:
    """Raise ValueError, naming the entry, unless ``state`` is what a Sparsifier saves: numbers, and the weights taken."""
    if not isinstance(state, dict):
        raise damaged(callback, f"it must be a dict, got {_short(state)}")
    for name, (holds, wanted) in _ENTRIES.items():
        if name in _REQUIRED or name in state:
            entry(callback, state, name, holds, wanted)
    for kind in ("held", "cut"):
        for name, held in state.get(kind, {}).items():
            if name in callback.parameters and held.shape != callback.parameters[name].shape:
                shape = tuple(callback.parameters[name].shape)
                raise damaged(callback, f"{kind!r} of {name!r} is {_short(held)}, the weight has shape {shape}")


def entry(callback: Form, state: Mapping[str, Any], name: str, holds: Callable[[Any], bool], wanted: str) -> None:
    """Raise ValueError unless ``state[name]`` is there and ``holds`` of it."""
    if name not in state:
        raise damaged(callback, f"it lacks {name!r}; it has {_short(sorted(map(str, state)))}")
    if not holds(state[name]):
        raise damaged(callback, f"{name!r} must be {wanted}, got {_short(state[name])}")


def is_count(value: Any) -> bool:
    """A whole number >= 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def are_names(value: Any) -> bool:
    """A list of strings."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def callbacks_of(checkpoint: Mapping[str, Any]) -> dict[Any, Any]:
    """The callbacks' states in a checkpoint; ValueError where they are no dict."""
    states = checkpoint.get("callbacks") or {}
    if not isinstance(states, dict):
        raise ValueError(f"the checkpoint is damaged: its 'callbacks' must be a dict by state key, got {_short(states)}")
    return states


def are_tensors(value: Any) -> bool:
    """A dict of finite floating tensors by name."""
    return _by_name(value) and all(
        isinstance(part, Tensor) and part.is_floating_point() and bool(torch.isfinite(part).all()) for part in value.values()
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def is_factor(value: Any) -> bool:
    """A finite float > 0."""
    return isinstance(value, float) and 0 < value < float("inf")


def _are_taken(value: Any) -> bool:
    return are_tensors(value) and all(taken.dim() == 1 for taken in value.values())


def _are_masks(value: Any) -> bool:
    return _by_name(value) and all(isinstance(mask, Tensor) and mask.dtype == torch.bool for mask in value.values())


def _by_name(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def _is_recipe(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("class_path"), str) and _has_arguments(value)


def _has_arguments(value: Any) -> bool:
    if not isinstance(value, dict):
        return True
    return ("class_path" not in value or isinstance(value.get("init_args"), dict)) and all(map(_has_arguments, value.values()))


_COUNT = (is_count, "a whole number >= 0")
_FLAG = (_is_flag, "True or False")
_TAKEN = (_are_taken, "a dict of finite 1-dimensional floating tensors by parameter name")
_ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "step": _COUNT,
    "offset": _COUNT,
    "frozen": _FLAG,
    "taken": _TAKEN,
    "begun": _FLAG,
    "drift": (_is_whole, "a whole number"),
    "averaged": _TAKEN,
    "held": (_are_masks, "a dict of boolean tensors by parameter name"),
    "cut": (_are_masks, "a dict of boolean tensors by parameter name"),
    "total": (is_factor, "a finite number > 0"),
    "clipped": (is_factor, "a finite number > 0"),
    "ascent": (target.is_state, "a dict of finite numbers 'log_lam', 'error' and 't'"),
    "step_sizes": (step_sizes.are_step_sizes, "a dict of the tensors of measured step sizes by parameter name"),
    "recipe": (_is_recipe, "a dict with 'class_path' and 'init_args'"),
}
_REQUIRED = ("step", "offset", "frozen", "taken")  # the others came later, or stand for an option


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} with shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def damaged(callback: Form, what: str) -> ValueError:
    """The error for a state that is not what the form saves."""
    return ValueError(
        f"the checkpoint's state of {type(callback).__name__} is damaged: {what}. Resume from another file, or load this one's "
        "weights into the module and fit without ckpt_path"
    )
