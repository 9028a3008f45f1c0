"""Fixtures of this folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from lightning_sparse.elementwise import kernels


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replace the compiler by the function itself, and record the number of elements of each call."""
    calls: list[int] = []

    def pretend(function: Callable[..., None], *_: Any) -> Callable[[list[Tensor]], None]:
        return lambda given: (calls.append(given[0].numel()), function(*given))[1]

    monkeypatch.setattr(kernels, "_compile", pretend)
    monkeypatch.setattr(kernels, "_COMPILED", {})
    return calls
