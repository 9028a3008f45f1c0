"""Sparse training by adaptive masks or the equivalent reweighted penalties.

Importing this package imports torch and nothing else that is heavy; ``metrics``, ``testing``, ``plots`` and
``callbacks`` are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from lightning_sparse import curvature, duality, mask_rules, noise, penalties, schedules
from lightning_sparse._version import __version__
from lightning_sparse.elementwise import raise_malloc_thresholds

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
    "raise_malloc_thresholds",
    "schedules",
    "testing",
]
_LAZY = {"callbacks", "metrics", "plots", "testing"}


def _add_source_tree(path: list[str]) -> None:
    """Let a source tree's own folders be found, because at its root the folder ``lightning_sparse`` hides the installed package.

    There ``callbacks`` and ``recipes`` stand beside that folder, not in it.
    """
    beside = Path(path[0]).parent
    ours = all((beside / name).exists() for name in ("pyproject.toml", "callbacks/sparsity_monitor.py"))
    if ours and not Path(path[0], "callbacks").exists():
        path.append(str(beside))


_add_source_tree(__path__)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"lightning_sparse.{name}")
    raise AttributeError(f"module 'lightning_sparse' has no attribute {name!r}")
