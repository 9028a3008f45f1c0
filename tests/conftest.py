"""Fixtures shared by tests of several folders. Imported helpers are in this folder; the tests mirror the source tree."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # because threads slow small networks down


@pytest.fixture(scope="session")
def wandb_offline() -> Iterator[None]:
    """Set W&B to silent offline runs in a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session", autouse=True)
def _entry_points_are_read_once() -> Iterator[None]:
    """Cache the entry points of installed distributions, because reading them for every Trainer takes a sixth of a small fit."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("lightning.fabric.utilities.registry", "lightning_fabric.utilities.registry"):
            if name in sys.modules:
                patch.setattr(sys.modules[name], "entry_points", functools.cache(sys.modules[name].entry_points))
        yield
