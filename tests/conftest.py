"""Fixtures shared by tests of several folders. Imported helpers are in this folder; the tests mirror the source tree."""

from __future__ import annotations

import functools
import gc
import os
import re
import sys
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # because threads slow small networks down


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse names of tests that differ between processes, because pytest-xdist then runs nothing and does not say why."""
    if odd := [item.nodeid for item in items if re.search(r"\bat 0x[0-9a-f]{6}", item.nodeid)]:
        raise pytest.UsageError(f"these tests have an address in memory in their name; give them ids: {odd}")


def pytest_collection_finish() -> None:
    """Exclude the imported modules from garbage collection, because searching them takes an eighth of the tests' time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _environment_of_earlier_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove what libraries store in the environment for the processes that a test starts, so that a later test's do not use it.

    The seed of seed_everything() would be that of DDP, and W&B's service would write relative folders where it was started.
    """
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "WANDB_SERVICE"):
        monkeypatch.setenv(name, "")  # so that the test's end restores it, whoever changes it
        monkeypatch.delenv(name)


@pytest.fixture(scope="session", autouse=True)
def _root(pytestconfig: pytest.Config) -> set[str]:
    """Return the names of files and folders in the root when the tests start; those that a test left are added."""
    return _entries(pytestconfig)


@pytest.fixture(autouse=True)
def _nothing_is_left_in_the_root(_root: set[str], pytestconfig: pytest.Config) -> Iterator[None]:
    """Fail a test that leaves a file or folder in the root, where a test in another process might read it; use tmp_path."""
    yield
    left = sorted(_entries(pytestconfig) - _root)
    _root.update(left)
    assert not left, f"this test, or one that ran beside it, left {left} in {pytestconfig.rootpath}; write to tmp_path"


def _entries(config: pytest.Config) -> set[str]:
    """Return the names in the root, without caches and hidden files."""
    return {name for name in os.listdir(config.rootpath) if not name.startswith((".", "__pycache__"))}


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
