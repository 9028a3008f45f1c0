"""Sparse training by adaptive masks or the equivalent reweighted penalties.

Importing this package imports torch and nothing else that is heavy; ``metrics``, ``testing``, ``plots`` and
``callbacks`` are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from lightning_sparse import curvature, duality, mask_rules, noise, penalties, schedules
from lightning_sparse._version import __version__

__all__ = [
    "__version__",
    "callbacks",
    "curvature",
    "duality",
    "mask_rules",
    "metrics",
    "noise",
    "penalties",
    "plots",
    "schedules",
    "testing",
]
_LAZY = {"callbacks", "metrics", "plots", "testing"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"lightning_sparse.{name}")
    raise AttributeError(f"module 'lightning_sparse' has no attribute {name!r}")
