"""Import packages of the extra ``export``."""

from __future__ import annotations

import importlib
from typing import Any


def load(name: str, purpose: str) -> Any:
    """Import a package; raise ImportError that names the extra if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{purpose} needs the package {name.partition('.')[0]}: pip install 'lightning-sparse[export]'") from error
