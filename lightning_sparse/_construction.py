"""How objects that a user makes take their arguments: plain numbers, errors that name the class, all arguments documented."""

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

    Numbers of numpy and torch among the arguments become Python's (:func:`plain`). An argument that is missing or unknown is
    answered with the name of the class that was called. A docstring is completed with the arguments that a base describes.
    """

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> None:
        super().__init__(name, bases, namespace, **options)
        _docstrings.complete(cls)

    def __call__(cls: type[Made], *args: Any, **kwargs: Any) -> Made:
        args, kwargs = plain(args), plain(kwargs)
        try:
            return type.__call__(cls, *args, **kwargs)  # type: ignore[no-any-return]
        except TypeError as error:
            wrong = _misfit(cls, args, kwargs, str(error))
            if not wrong:
                raise
        raise TypeError(wrong)

    @property
    def __signature__(cls) -> inspect.Signature:
        """The signature of ``__init__``, which inspect would take from ``__call__`` otherwise."""
        taken = inspect.signature(cls.__init__)  # type: ignore[misc]
        return taken.replace(parameters=list(taken.parameters.values())[1:], return_annotation=inspect.Signature.empty)


def _misfit(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any], error: str) -> str:
    """What is wrong with arguments that a class does not take; empty where it takes them and the ``error`` is of another kind."""
    signature, known = inspect.signature(cls), _docstrings.parameters(cls)
    for name in kwargs:
        if name not in known and f"unexpected keyword argument {name!r}" in error:  # a base's, to which keywords were passed on
            return f"{cls.__name__} takes no {name!r}{_checks.closest(name, known)}; it takes {', '.join(known)}"
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return f"{cls.__name__} {_reason(signature, args, kwargs)}"
    of_base = re.fullmatch(r"([\w.<>]+)\.__init__\(\) (missing .*)", error)
    return f"{cls.__name__}: {of_base[2]}" if of_base and of_base[1] in {base.__qualname__ for base in cls.__mro__} else ""


def _reason(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    taken = signature.parameters
    by_place = [name for name, one in taken.items() if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    takes = f"it takes {', '.join(map(_short, taken.values()))}" if taken else "it takes no arguments"
    if len(args) > len(by_place):
        return f"got {len(args)} arguments by position and takes at most {len(by_place)} that way; {takes}"
    if twice := [name for name in by_place[: len(args)] if name in kwargs]:
        return f"got {twice[0]!r} twice, by position and by name"
    needed = [name for name, one in taken.items() if one.default is one.empty and one.kind not in _ANY]
    missing = [name for name in needed if name not in kwargs and name not in by_place[: len(args)]]
    return f"needs {' and '.join(map(repr, missing))}; {takes}"


def _short(one: inspect.Parameter) -> str:
    return str(one.replace(annotation=one.empty))


def typed(made: Any, settings: Mapping[str, Any] | None = None) -> str:
    """An object as one would type it: its class, and those of its arguments that are not the defaults.

    ``settings``: the values of arguments; others are the attributes of the same name.
    """
    values = vars(made) | dict(settings or {})
    taken = _docstrings.parameters(type(made))
    told = [f"{name}={values[name]!r}" for name, one in taken.items() if name in values and repr(values[name]) != repr(one.default)]
    return f"{type(made).__name__}({', '.join(told)})"
