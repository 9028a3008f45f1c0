"""Construct the objects that users create: plain numbers, errors that name the class, all arguments documented."""

from __future__ import annotations

import inspect
import re
from abc import ABCMeta
from collections.abc import Mapping
from typing import Any, TypeVar

from lightning_sparse import _checks, _docstrings
from lightning_sparse._plain import plain

Made = TypeVar("Made")
_ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Constructed(ABCMeta):
    """Metaclass of penalties, rules, schedules, noise, curvature and callbacks, a user's own subclasses included.

    Converts numbers of numpy and torch among the arguments to Python's (:func:`plain`). Names the class in the error for a missing
    or unknown argument. Completes docstrings with the arguments that a base describes.
    """

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> None:
        super().__init__(name, bases, namespace, **options)
        _docstrings.complete(cls)

    def __call__(cls: type[Made], *args: Any, **kwargs: Any) -> Made:
        args, kwargs = plain(args), plain(kwargs)
        try:
            return type.__call__(cls, *args, **kwargs)  # type: ignore[no-any-return]
        except TypeError as error:
            wrong = _wrong_arguments(cls, args, kwargs, str(error))
            if not wrong:
                raise
        raise TypeError(wrong)

    @property
    def __signature__(cls) -> inspect.Signature:
        """Return the signature of ``__init__``, because inspect would use that of ``__call__``."""
        taken = inspect.signature(cls.__init__)  # type: ignore[misc]
        own = list(taken.parameters.values())[1:]
        if [one.kind for one in own if one.kind in _ANY] == [inspect.Parameter.VAR_KEYWORD]:  # keywords that a base takes
            known = _docstrings.parameters(cls)
            first = {one.name: one for one in own if one.kind is one.POSITIONAL_OR_KEYWORD}
            own = [*first.values(), *(one.replace(kind=one.KEYWORD_ONLY) for name, one in known.items() if name not in first)]
        return taken.replace(parameters=own, return_annotation=inspect.Signature.empty)


def _wrong_arguments(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any], error: str) -> str:
    """Describe what is wrong with the arguments of a class; empty if they fit and ``error`` is of another kind."""
    signature, known = inspect.signature(cls), _docstrings.parameters(cls)
    for name in kwargs:
        if name not in known and f"unexpected keyword argument {name!r}" in error:  # raised by a base that keywords were passed to
            return _unknown(cls, name, known)
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        if unknown := next((name for name in kwargs if name not in known), None):  # first, because a misspelt name is also missing
            return _unknown(cls, unknown, known)
        return f"{cls.__name__} {_reason(cls, signature, args, kwargs)}"
    of_base = re.fullmatch(r"([\w.<>]+)\.__init__\(\) (missing .*)", error)
    return f"{cls.__name__}: {of_base[2]}" if of_base and of_base[1] in {base.__qualname__ for base in cls.__mro__} else ""


def _unknown(cls: type, name: str, known: Mapping[str, inspect.Parameter]) -> str:
    """Describe an argument that a class does not take: what to use instead, if its ``instead`` says so, or the closest names."""
    instead = getattr(cls, "instead", {}).get(name)
    hint = _checks.closest(name, known) if instead is None else f"; {instead}"
    return f"{cls.__name__} takes no {name!r}{hint}; it takes {', '.join(known)}"


def _reason(cls: type, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    taken = signature.parameters
    by_place = [name for name, one in taken.items() if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    takes = f"it takes {', '.join(map(_short, taken.values()))}" if taken else "it takes no arguments"
    if len(args) > len(by_place):
        return f"got {len(args)} arguments by position and takes at most {len(by_place)} that way; {takes}"
    if twice := [name for name in by_place[: len(args)] if name in kwargs]:
        return f"got {twice[0]!r} twice, by position and by name"
    needed = [name for name, one in taken.items() if one.default is one.empty and one.kind not in _ANY]
    missing = [name for name in needed if name not in kwargs and name not in by_place[: len(args)]]
    return f"needs {' and '.join(map(repr, missing))}{_example(cls, missing)}; {takes}"


def _example(cls: type, missing: list[str]) -> str:
    """Return a call that works, from the class's ``sample`` or its first example; empty if that lacks a missing argument."""
    first: Mapping[str, Any] = next(iter(getattr(cls, "examples", ())), {})
    shown: Mapping[str, str] = getattr(cls, "sample", None) or {name: repr(value) for name, value in first.items()}
    listed = ", ".join(f"{name}={value}" for name, value in shown.items())
    return f", for example {cls.__name__}({listed})" if set(missing) <= set(shown) else ""


def _short(one: inspect.Parameter) -> str:
    return str(one.replace(annotation=one.empty))


def brief(made: Any) -> str:
    """Return an object's repr for a message: on one line, tensors among its arguments by their shape."""
    tensors = {name: _Shape(tuple(value.shape)) for name, value in vars(made).items() if getattr(value, "shape", ())}
    return typed(made, tensors) if tensors else repr(made)


class _Shape(tuple[int, ...]):
    """Stands for a tensor in a message."""

    def __repr__(self) -> str:
        return f"<tensor of {' x '.join(map(str, self))}>"


def typed(made: Any, settings: Mapping[str, Any] | None = None) -> str:
    """Return the expression that creates an object: its class and the arguments that differ from the defaults.

    ``settings`` holds values of arguments; the others are read from the attributes of the same name.
    """
    values = vars(made) | dict(settings or {})
    taken = _docstrings.parameters(type(made))
    listed = [f"{name}={values[name]!r}" for name, one in taken.items() if name in values and repr(values[name]) != repr(one.default)]
    return f"{type(made).__name__}({', '.join(listed)})"
