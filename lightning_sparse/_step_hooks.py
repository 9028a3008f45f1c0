"""Calls functions around a method of one optimiser object, such as its steps, once for each call from outside.

torch's own step hooks belong to a class's ``step``: where a subclass calls ``super().step()`` they run once for each class in
between that was ever instantiated, and not at all for a wrapper that never calls ``Optimizer.__init__``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

Hook = Callable[[Any], None]  # takes the optimiser


class _Hooks(NamedTuple):
    before: Hook | None
    after: Hook | None


class Handle:
    """Removes the hooks of one :func:`around`, and with the last one the object's own method that called them."""

    def __init__(self, optimizer: Any, method: str, hooks: dict[int, _Hooks]) -> None:
        self._optimizer, self._method, self._hooks, self._key = optimizer, method, hooks, id(self)

    def remove(self) -> None:
        """Remove the hooks; once more does nothing."""
        self._hooks.pop(self._key, None)
        own = vars(self._optimizer).get(self._method)
        if self._hooks or not isinstance(own, MethodType) or getattr(own.__func__, "_sparse_hooks", None) is not self._hooks:
            return  # others need it, or something else has wrapped it since: it stays and calls nothing
        if own.__func__._sparse_own is None:  # type: ignore[attr-defined]
            delattr(self._optimizer, self._method)
        else:
            setattr(self._optimizer, self._method, own.__func__._sparse_own)  # type: ignore[attr-defined]


def around(optimizer: Any, before: Hook | None = None, after: Hook | None = None, method: str = "step") -> Handle:
    """Call ``before(optimizer)`` when a step of ``optimizer`` begins and ``after(optimizer)`` when it has ended.

    A step that the optimiser takes within its own step (``super().step()``, an optimiser that it holds) is part of it. After
    a step that raised, ``after`` is not called. Another ``method`` than ``step`` is watched in the same way.
    """
    hooks: dict[int, _Hooks] | None = getattr(getattr(optimizer, method), "_sparse_hooks", None)
    if hooks is None:
        hooks = {}
        setattr(optimizer, method, MethodType(_watched(optimizer, method, hooks), optimizer))
    handle = Handle(optimizer, method, hooks)
    hooks[id(handle)] = _Hooks(before, after)
    return handle


def _watched(optimizer: Any, method: str, hooks: dict[int, _Hooks]) -> Callable[..., Any]:
    """A method for ``optimizer`` that calls ``hooks`` around the one it has."""
    own, inside = vars(optimizer).get(method), False  # ``own``: of this object, such as a scheduler's step
    given = getattr(optimizer, method)

    @functools.wraps(getattr(given, "__func__", given))  # GradScaler reads a step's signature, schedulers its marks
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        call = functools.partial(getattr(type(self), method), self) if own is None else own
        if inside or self is not optimizer:  # a copy of the optimiser has a copy of this method
            return call(*args, **kwargs)
        called = [*hooks.values()]
        for one in called:
            if one.before is not None:
                one.before(self)
        inside = True
        try:
            result = call(*args, **kwargs)
        finally:
            inside = False
        for one in called:
            if one.after is not None:
                one.after(self)
        return result

    watched._sparse_hooks, watched._sparse_own = hooks, own  # type: ignore[attr-defined]
    return watched
