"""Issue warnings from the line of the user's code that they concern, not from this package or Lightning."""

from __future__ import annotations

import os
import sys
import sysconfig
import warnings
from collections import deque
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

import lightning_sparse

heard: deque[str] = deque(maxlen=100)  # the last warnings and notes of this process, which `compare` shows below its table
_PACKAGES = ("lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "torch", "jsonargparse")


@rank_zero_only
def rank_zero_warn(message: str) -> None:
    """Warn, on rank 0, from the innermost frame of the user's code; from the caller's if there is none."""
    heard.append(message)
    caller = sys._getframe(1)
    frame = _users_frame(caller) or caller
    module, registry = frame.f_globals.get("__name__", "<unknown>"), frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(message, UserWarning, frame.f_code.co_filename, frame.f_lineno, module, registry)


@rank_zero_only
def rank_zero_note(message: str) -> None:
    """Log, on rank 0, what is a warning in a longer run: one of a few steps may be a trial."""
    heard.append(message)
    rank_zero_info(message)


def _users_frame(frame: FrameType | None) -> FrameType | None:
    while frame is not None and _is_foreign(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def _is_foreign(file: str) -> bool:
    """Return True for a file of this package, of Lightning, of torch, or of Python's standard library."""
    return file.startswith(_FOLDERS) or (file.startswith(_LIBRARY) and "site-packages" not in file and "dist-packages" not in file)


def _folders() -> tuple[str, ...]:
    found = [spec.origin for name in _PACKAGES if (spec := find_spec(name)) is not None and spec.origin]
    return tuple(f"{Path(file).parent}{os.sep}" for file in [lightning_sparse.__file__, __file__, *found])


_FOLDERS, _LIBRARY = _folders(), (sysconfig.get_paths()["stdlib"] + os.sep, "<frozen ")
