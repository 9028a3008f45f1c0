"""Convert numbers and strings of numpy, torch or a YAML library to plain Python values."""

from __future__ import annotations

import enum
import numbers
from typing import Any

_EXACT = (bool, int, float, complex, str, bytes, type(None))


def plain(given: Any) -> Any:
    """Return ``given`` with numpy scalars, 0-d arrays and tensors, and subclasses of int, float and str as plain Python values.

    Lists, tuples and dicts are converted recursively. Everything else is returned as it is: objects, enums, larger arrays, and
    tensors that require a gradient, because a number would lose their graph. Checkpoints hold a run's arguments, and
    torch.load(weights_only=True) cannot read numpy's numbers in them.
    """
    if type(given) in _EXACT or isinstance(given, enum.Enum):
        return given
    if type(given) in (list, tuple, dict):
        return _container(given)
    if isinstance(given, str):
        return str.__str__(given)
    if getattr(given, "ndim", None) != 0 or not hasattr(given, "item"):
        return _python(given) if isinstance(given, (int, float)) else given
    value = given if getattr(given, "requires_grad", False) else given.item()
    return _python(value) if isinstance(value, (numbers.Number, bytes)) else given


def _python(value: Any) -> Any:
    if isinstance(value, (bool, bytes)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value  # numpy's longdouble.item() is a longdouble


def _container(given: Any) -> Any:
    """Return a converted container; the same object if nothing in it changes."""
    if isinstance(given, dict):
        pairs = {plain(key): plain(value) for key, value in given.items()}
        same = all(map(_same, given.items(), pairs.items()))
        return given if same else pairs
    items = [plain(value) for value in given]
    return given if all(old is new for old, new in zip(given, items, strict=True)) else type(given)(items)


def _same(old: tuple[Any, Any], new: tuple[Any, Any]) -> bool:
    return old[0] is new[0] and old[1] is new[1]
