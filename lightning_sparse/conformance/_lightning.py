"""The Lightning package used by the checks: ``lightning.pytorch`` or ``pytorch_lightning``.

The environment variable ``LIGHTNING_SPARSE_PACKAGE`` selects it, also for child processes of the checks. Checks import
Lightning's classes from this module, so that all classes come from one package.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
NAME = os.environ.get("LIGHTNING_SPARSE_PACKAGE", PACKAGES[0])
if NAME not in PACKAGES:
    raise ValueError(f"LIGHTNING_SPARSE_PACKAGE must be one of {', '.join(PACKAGES)}, got {NAME!r}")

if TYPE_CHECKING:
    from lightning.pytorch import *  # noqa: F403
    from lightning.pytorch import callbacks as callbacks
    from lightning.pytorch.callbacks import *  # noqa: F403
    from lightning.pytorch.loggers import *  # noqa: F403
    from lightning.pytorch.plugins.precision import *  # noqa: F403
    from lightning.pytorch.strategies import *  # noqa: F403
else:
    callbacks = importlib.import_module(f"{NAME}.callbacks")
    for _submodule in ("", ".callbacks", ".loggers", ".plugins.precision", ".strategies"):
        _module = importlib.import_module(NAME + _submodule)
        globals().update({name: getattr(_module, name) for name in _module.__all__ if not name.startswith("__")})


def other() -> Any | None:
    """Import the Lightning package not used by the checks; None if it is not installed."""
    (name,) = (name for name in PACKAGES if name != NAME)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None
