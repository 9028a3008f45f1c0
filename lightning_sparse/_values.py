"""What may stand for everything that equals it, and be kept for it."""

from __future__ import annotations

import dataclasses
from typing import Any


def is_value(given: Any) -> bool:
    """It is what its fields say, for ever: a frozen dataclass, not a class made out of one, of numbers, words and its like."""
    settings = vars(type(given)).get("__dataclass_params__")
    if settings is None or not (settings.frozen and settings.eq):
        return False
    values = [(field.compare, getattr(given, field.name)) for field in dataclasses.fields(given)]
    return all(compared and (is_plain(value) or is_value(value)) for compared, value in values)


def is_plain(given: Any) -> bool:
    """A number, a word or None."""
    return type(given) in (bool, int, float, str, type(None))
