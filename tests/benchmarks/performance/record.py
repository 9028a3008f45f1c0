"""Records of benchmarks: JSON with results, command, versions and settings."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent / "results"


def versions(*more: str) -> dict[str, str]:
    """Return versions of Python, torch, Lightning, this package and the distributions in ``more``."""
    names = ("torch", "lightning", "lightning-sparse", *more)
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def write(file: Path, command: str, settings: Mapping[str, Any], results: Any, packages: Sequence[str] = ()) -> Path:
    """Write a JSON file; ``results`` depends on the benchmark. Numbers are rounded to six digits."""
    found = {"command": command, "versions": versions(*packages), "threads": torch.get_num_threads(), "settings": dict(settings)}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rounded(found | {"results": results}), indent=1) + "\n", encoding="utf-8")
    return file


def rounded(value: Any) -> Any:
    """Round floats to six significant digits, also inside containers."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, (list, tuple)) else value


def read(name: str, folder: Path = FOLDER) -> dict[str, Any] | None:
    """Read the record ``name``.json; None if it is missing."""
    file = folder / f"{name}.json"
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
