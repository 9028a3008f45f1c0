"""Timing of a callback's hooks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback

NAMES = [name for name in vars(Callback) if name.startswith("on_") or name in ("setup", "teardown")]


def timed(callback: Callback, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Wrap the hooks of ``callback``; return seconds by hook, updated while a Trainer calls them."""
    spent = dict.fromkeys(NAMES, 0.0)
    for name in NAMES:
        setattr(callback, name, _wrapped(getattr(callback, name), name, spent, clock))
    return spent


def _wrapped(hook: Callable[..., Any], name: str, spent: dict[str, float], clock: Callable[[], float]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        start = clock()
        try:
            return hook(*args, **options)
        finally:
            spent[name] += clock() - start

    return call
