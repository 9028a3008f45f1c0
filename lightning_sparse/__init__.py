"""Sparse training by adaptive masks or the equivalent reweighted penalties.

Importing this package imports torch and no other heavy package; ``metrics``, ``testing``, ``plots`` and ``callbacks`` are imported
at their first use.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from lightning_sparse import curvature, duality, mask_rules, noise, penalties, schedules, scores, structure
from lightning_sparse._version import __version__
from lightning_sparse.elementwise import raise_malloc_thresholds

__all__ = [
    "__version__",
    "callbacks",
    "coupling",
    "curvature",
    "duality",
    "export",
    "load_shrunk",
    "mask_rules",
    "metrics",
    "noise",
    "penalties",
    "plots",
    "raise_malloc_thresholds",
    "save_shrunk",
    "schedules",
    "scores",
    "shrink",
    "shrinking",
    "structure",
    "testing",
]
_LAZY = {"callbacks", "coupling", "export", "metrics", "plots", "shrinking", "testing"}
_LAZY_FUNCTIONS = {"load_shrunk": "shrinking", "save_shrunk": "shrinking", "shrink": "shrinking"}


def _add_source_tree(path: list[str]) -> None:
    """Add a source tree's ``callbacks`` and ``recipes`` to the package path, because they are beside ``lightning_sparse`` there.

    At the root of a source tree the folder ``lightning_sparse`` hides the installed package.
    """
    beside = Path(path[0]).parent
    ours = all((beside / name).exists() for name in ("pyproject.toml", "callbacks/sparsity_monitor.py"))
    if ours and not Path(path[0], "callbacks").exists():
        path.append(str(beside))


_add_source_tree(__path__)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"lightning_sparse.{name}")
    if name in _LAZY_FUNCTIONS:
        return getattr(importlib.import_module(f"lightning_sparse.{_LAZY_FUNCTIONS[name]}"), name)
    raise AttributeError(f"module 'lightning_sparse' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List also what is imported when it is first used."""
    return sorted({*globals(), *__all__})
