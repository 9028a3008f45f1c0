"""Check arguments; messages are one sentence that states what was given and what is accepted."""

from __future__ import annotations

import difflib
import inspect
import math
import os
import re
from collections.abc import Iterable, Mapping, Sized

from torch import Tensor, nn

from lightning_sparse._plain import plain


def number(name: str, value: object) -> float:
    """Return ``value``, a number of Python, numpy or torch, as a float; raise TypeError for anything else."""
    given = plain(value)
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}{_as_number(given)}")
    return float(given)


def _as_number(given: object) -> str:
    """Return the number that a text stands for, for errors."""
    try:
        return f"; did you mean {float(given):g}?" if isinstance(given, str) else ""
    except ValueError:
        return ""


def positive(name: str, value: object) -> float:
    """Return ``value`` if it is a finite number above zero; raise ValueError otherwise."""
    checked = number(name, value)
    if not (math.isfinite(checked) and checked > 0):
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
    return checked


def between(name: str, value: object, low: float, high: float, *, closed: str = "") -> float:
    """Return ``value`` if it lies between ``low`` and ``high``; ``closed`` holds "l" and "r" for ends that count."""
    checked = number(name, value)
    above = checked >= low if "l" in closed else checked > low
    below = checked <= high if "r" in closed else checked < high
    if not (above and below):
        interval = f"{'[' if 'l' in closed else '('}{low:g}, {high:g}{']' if 'r' in closed else ')'}"
        raise ValueError(f"{name} must lie in {interval}, got {value!r}")
    return checked


def share(name: str, value: object, *, closed: str = "") -> float:
    """Return ``value`` if it is a share between 0 and 1; for a number from 2 to 100 the error names the share of as many per cent."""
    try:
        return between(name, value, 0, 1, closed=closed)
    except TypeError as error:
        written = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", value) if isinstance(value, str) else None
        raise TypeError(f"{error}; did you mean {float(written[1]) / 100:g}?" if written else str(error)) from None
    except ValueError as error:
        percent = number(name, value)
        raise ValueError(f"{error}; did you mean {percent / 100:g}?" if 2 <= percent < 100 else f"{error}: it is a share") from None


def truth(name: str, value: object) -> bool:
    """Return ``value`` if it is True or False; raise TypeError otherwise."""
    given = plain(value)
    if not isinstance(given, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}")
    return given


def whole(name: str, value: object, low: int) -> int:
    """Return ``value`` if it is a whole number >= ``low``; raise ValueError otherwise."""
    given = plain(value)
    if isinstance(given, bool) or not isinstance(given, int) or given < low:
        raise ValueError(f"{name} must be a whole number >= {low}, got {value!r}")
    return given


def one_of(name: str, value: object, known: Iterable[str]) -> str:
    """Return ``value`` if it is one of the ``known`` words; raise ValueError, with those that come close, otherwise."""
    words, given = list(known), plain(value)
    if not isinstance(given, str) or given not in words:
        *first, last = map(repr, words)
        raise ValueError(f"{name} must be {', '.join(first)} or {last}, got {value!r}{closest(str(value), words)}")
    return given


def module(value: object, call: str, other: str = "") -> None:
    """Raise TypeError, with what to do, unless ``value`` is a module.

    Args:
        value: the first argument of a function.
        call: the function with its arguments, as one would write it.
        other: what the function accepts beside a module, such as " or a state dict"; the caller has looked for it.
    """
    if isinstance(value, nn.Module):
        return
    hint = ""
    if isinstance(value, type) and issubclass(value, nn.Module):
        hint = f"create it first: {value.__name__}(...)"
    elif isinstance(value, (str, os.PathLike)):
        hint = "build the module first, and load the weights of a file into it: MyModule.load_from_checkpoint(path), or load_state_dict"
    raise TypeError(f"{_name(call)} takes an instance of nn.Module{other} first, got {described(value)}{_order(call, hint)}")


def path(value: object, name: str, call: str) -> None:
    """Raise TypeError, with the ``call`` as one would write it, unless ``value``, the argument ``name``, is a path."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} of {_name(call)} must be a path, got {described(value)}{_order(call)}")


def file(value: object, name: str, call: str, example: str) -> None:
    """Raise TypeError as :func:`path`, and ValueError, with an ``example`` of a file's name, for a folder that exists."""
    path(value, name, call)
    if isinstance(value, (str, os.PathLike)) and os.path.isdir(value):
        inside = os.path.join(os.fspath(value), example)
        given = os.fspath(value)
        raise ValueError(f"{name} of {_name(call)} must be a file, got the folder {given!r}: give a file in it, such as {inside!r}")


def tensors(value: object, call: str, listed: bool = False) -> None:
    """Raise TypeError, with what to give, unless ``value`` is a mapping or, with ``listed``, another iterable of tensors."""
    if isinstance(value, Mapping) or (listed and isinstance(value, Iterable) and not isinstance(value, (nn.Module, str))):
        return
    if listed and isinstance(value, nn.ParameterList):
        return
    hint = "give select.select(module, None), or dict(module.named_parameters())" if isinstance(value, nn.Module) else ""
    more = ", an iterable of tensors or one tensor" if listed else ""
    raise TypeError(f"{_name(call)} takes a mapping of names to tensors{more}, got {described(value)}{_order(call, hint)}")


def described(value: object) -> str:
    """Describe an argument in a few words: its class, and its shape or its beginning."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, Tensor):
        return f"a tensor of the shape {tuple(value.shape)}"
    if isinstance(value, nn.Module):
        return f"the module {type(value).__name__}"
    return f"{repr(value)[:60]} of type {type(value).__name__}"


def _name(call: str) -> str:
    return call.partition("(")[0]


def _order(call: str, hint: str = "") -> str:
    return f": {hint}; the call is {call}" if hint else f": the call is {call}"


def shown(value: object, *kinds: type) -> str:
    """Describe a value that is not accepted; a class below one of the accepted ``kinds`` gets the hint to create an instance."""
    if not (isinstance(value, type) and issubclass(value, kinds)) or inspect.isabstract(value):
        return repr(value)
    parameters = inspect.signature(value).parameters.values()
    needed = [one.name for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    return f"the class {value.__name__}; did you mean {value.__name__}({', '.join(f'{name}=...' for name in needed)})?"


def more(found: Sized, shown: int = 5) -> str:
    """Return ``" and 3 more"`` for a message that names only the first ``shown`` of what was ``found``; empty if it names all."""
    return f" and {len(found) - shown} more" if len(found) > shown else ""


def counted(count: int, one: str, many: str) -> str:
    """Return a count with its noun, such as ``"1 axis"`` and ``"3 axes"``."""
    return f"{count} {one if count == 1 else many}"


def closest(word: str, known: Iterable[str], count: int = 3) -> str:
    """Return a hint such as ``"; closest: 'a', 'b'"``, empty when nothing is near."""
    names = list(known)
    lowered = {name.lower(): name for name in names}
    near = [lowered[hit] for hit in difflib.get_close_matches(word.lower(), lowered, n=count, cutoff=0.4)]
    return "; closest: " + ", ".join(repr(name) for name in near) if near else ""


_RISING = ("acc", "f1", "auc", "auroc", "precision", "recall", "map", "iou", "dice", "r2", "bleu", "rouge", "score")
_FALLING = ("loss", "error", "mape")  # although they may hold one of the words above


def is_larger_better(metric: str) -> bool:
    """Return True if larger values of a metric are better, guessed from its name."""
    return any(word in metric.lower() for word in _RISING) and not any(word in metric.lower() for word in _FALLING)
