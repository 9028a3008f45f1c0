"""Plain Python values of numbers and words that numpy, torch or a YAML library made."""

from __future__ import annotations

import enum
import numbers
from typing import Any

_EXACT = (bool, int, float, complex, str, bytes, type(None))


def plain(given: Any) -> Any:
    """Return ``given`` with numpy scalars, 0-dimensional arrays and tensors, and subclasses of int, float and str as Python's own.

    Lists, tuples and dicts are gone through. Everything else comes back as it is: objects, enums, larger arrays, and tensors
    that require a gradient, because a number would cut their graph. A file of a run holds its arguments, and numpy's numbers
    in it would keep torch.load(weights_only=True) from reading it.
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
    """The container itself, where nothing in it changes."""
    if isinstance(given, dict):
        pairs = {plain(key): plain(value) for key, value in given.items()}
        same = all(map(_same, given.items(), pairs.items()))
        return given if same else pairs
    items = [plain(value) for value in given]
    return given if all(old is new for old, new in zip(given, items, strict=True)) else type(given)(items)


def _same(old: tuple[Any, Any], new: tuple[Any, Any]) -> bool:
    return old[0] is new[0] and old[1] is new[1]
