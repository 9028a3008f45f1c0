"""Calls functions around the steps of one optimiser object, once for each step that is asked for from outside.

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
    """Removes the hooks of one :func:`around`, and the last one the object's own ``step`` that called them."""

    def __init__(self, optimizer: Any, hooks: dict[int, _Hooks]) -> None:
        self._optimizer, self._hooks, self._key = optimizer, hooks, id(self)

    def remove(self) -> None:
        """Remove the hooks; once more does nothing."""
        self._hooks.pop(self._key, None)
        own = vars(self._optimizer).get("step")
        if self._hooks or not isinstance(own, MethodType) or getattr(own.__func__, "_sparse_hooks", None) is not self._hooks:
            return  # others need it, or something else has wrapped it since: it stays and calls nothing
        if own.__func__._sparse_own is None:  # type: ignore[attr-defined]
            del self._optimizer.step
        else:
            self._optimizer.step = own.__func__._sparse_own  # type: ignore[attr-defined]


def around(optimizer: Any, before: Hook | None = None, after: Hook | None = None) -> Handle:
    """Call ``before(optimizer)`` when a step of ``optimizer`` begins and ``after(optimizer)`` when it has ended.

    A step that the optimiser takes within its own step (``super().step()``, an optimiser that it holds) is part of it. After
    a step that raised, ``after`` is not called.
    """
    hooks: dict[int, _Hooks] | None = getattr(optimizer.step, "_sparse_hooks", None)
    if hooks is None:
        hooks = {}
        optimizer.step = MethodType(_watched(optimizer, hooks), optimizer)
    handle = Handle(optimizer, hooks)
    hooks[id(handle)] = _Hooks(before, after)
    return handle


def _watched(optimizer: Any, hooks: dict[int, _Hooks]) -> Callable[..., Any]:
    """A ``step`` for ``optimizer`` that calls ``hooks`` around the one it has."""
    own, inside = vars(optimizer).get("step"), False  # ``own``: of this object, such as a scheduler's

    @functools.wraps(getattr(optimizer.step, "__func__", optimizer.step))  # GradScaler reads its signature, schedulers its marks
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        step_ = functools.partial(type(self).step, self) if own is None else own
        if inside or self is not optimizer:  # a copy of the optimiser has a copy of this method
            return step_(*args, **kwargs)
        called = [*hooks.values()]
        for one in called:
            if one.before is not None:
                one.before(self)
        inside = True
        try:
            result = step_(*args, **kwargs)
        finally:
            inside = False
        for one in called:
            if one.after is not None:
                one.after(self)
        return result

    step._sparse_hooks, step._sparse_own = hooks, own  # type: ignore[attr-defined]
    return step
