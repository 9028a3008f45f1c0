"""Small modules and data of the conformance suite, and helpers for tests only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_sparse.conformance.toys import Repeated, Spy, Toy, data, hooks, trainer, weights

__all__ = ["Moved", "Repeated", "Spy", "Toy", "data", "hooks", "several", "trainer", "weights"]


class Moved(Callback):
    """Record the names of weights that differ between a backward pass and after it. Put it last among the callbacks."""

    def __init__(self) -> None:
        self.seen: list[set[str]] = []

    def on_before_backward(self, trainer: Any, module: Any, loss: Any) -> None:
        self.within = weights(module)

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        self.seen.append({name for name, w in module.named_parameters() if not torch.equal(w, self.within[name])})


def several(rows: Mapping[str, Any], *fast: str) -> list[Any]:
    """Make parameters of a test by name (tuples for several arguments); those not in ``fast`` are marked slow."""
    if missing := set(fast) - rows.keys():
        raise KeyError(f"no row is named {sorted(missing)}")
    return [
        pytest.param(*(row if isinstance(row, tuple) else (row,)), id=name, marks=[pytest.mark.slow] * (name not in fast))
        for name, row in rows.items()
    ]
