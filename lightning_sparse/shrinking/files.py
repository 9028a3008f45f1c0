"""Save and load shrunk networks: weights, and a JSON of what was kept. Loading builds the user's class, so no file contains code."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_sparse import _checks, archive, surgery

_WEIGHTS, _SHAPE, _RECORD = "model.pt", "shape.json", "_shrunk"
_FORMAT = 1
Module = TypeVar("Module", bound=nn.Module)


def remember(smaller: nn.Module, before: nn.Module, kept: surgery.Indices, sizes: Mapping[str, int]) -> None:
    """Store in the module what was kept of the class's own shapes. A module that was shrunk before keeps its first shapes."""
    old: dict[str, Any] = vars(before).get(_RECORD) or _fresh(before)
    stays: dict[str, dict[str, list[int]]] = {name: dict(dims) for name, dims in old["kept"].items()}
    for name, dims in kept.items():
        for dim, indices in dims.items():
            earlier = stays.setdefault(name, {}).get(str(dim))
            stays[name][str(dim)] = [earlier[i] for i in indices] if earlier else list(indices)
    vars(smaller)[_RECORD] = {**old, "kept": stays, "sizes": {**old["sizes"], **sizes}}


def _fresh(module: nn.Module) -> dict[str, Any]:
    shapes = {name: list(tensor.shape) for name, tensor in surgery.tensors(module).items()}
    return {"format": _FORMAT, "class": _class_of(module), "arguments": _arguments(module), "shapes": shapes, "kept": {}, "sizes": {}}


def _class_of(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _arguments(module: nn.Module) -> dict[str, Any] | None:
    """Return what ``save_hyperparameters`` recorded, without LightningCLI's own keys, if it can be written as JSON; None otherwise."""
    given = getattr(module, "hparams", None)
    try:
        plain = json.loads(json.dumps({key: value for key, value in dict(given or {}).items() if not key.startswith("_")}))
    except (TypeError, ValueError):
        return None
    return plain or None


def save_shrunk(module: nn.Module, folder: str | Path) -> Path:
    """Write a shrunk module into a folder: ``model.pt`` (its state dict) and ``shape.json`` (class, arguments, kept indices).

    ``model.pt`` is the plain state dict of the smaller network; ``torch.load(..., weights_only=True)`` reads it. Weights that were
    trained further since :func:`shrink` are saved as they are now. Raises ValueError for a module that was not shrunk.
    """
    _checks.path(folder, "folder", "save_shrunk(module, folder)")
    _checks.module(module, "save_shrunk(module, folder)")
    record = vars(module).get(_RECORD)
    if record is None:
        raise ValueError(f"{type(module).__name__} was not shrunk: give the module of shrink(...), or one that load_shrunk returned")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    _replace(target / _WEIGHTS, lambda path: torch.save({name: t.cpu() for name, t in module.state_dict().items()}, path))
    _replace(target / _SHAPE, lambda path: path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8"))
    return target


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name and rename it, so that an interrupted run leaves no half of one."""
    beside = path.with_name(path.name + ".part")
    write(beside)
    os.replace(beside, path)


def load_shrunk(folder: str | Path, make: Callable[..., Module] | Module) -> Module:
    """Rebuild a shrunk module from a folder that :func:`save_shrunk` wrote.

    Args:
        folder: the folder.
        make: the module's class (called with the arguments of its ``save_hyperparameters``), a function without arguments that
            builds the module at full size, or such a module (it is not changed).

    Raises ValueError for a missing or damaged file, and for a class whose tensors have other names or shapes.
    """
    _checks.path(folder, "folder", "load_shrunk(folder, make)")
    if not callable(make):
        raise TypeError(f"load_shrunk takes a module, its class or a function that builds it second, got {_checks.described(make)}")
    record = _read(Path(folder))
    module = _build(make, record)
    _compare(module, record, Path(folder))
    state = _state(Path(folder) / _WEIGHTS)
    try:
        kept = {name: {int(dim): indices for dim, indices in dims.items()} for name, dims in record["kept"].items()}
        surgery.cut_(module, kept, record["sizes"])
        module.load_state_dict(state)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        words = " ".join(str(error).split())[:200]
        raise ValueError(f"the files in {folder} do not belong together, or are damaged: {type(error).__name__}: {words}") from error
    vars(module)[_RECORD] = record
    return module


def _read(folder: Path) -> dict[str, Any]:
    for name in (_WEIGHTS, _SHAPE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}: give the folder that save_shrunk wrote")
    try:
        record = json.loads((folder / _SHAPE).read_text(encoding="utf-8"))
        if record["format"] != _FORMAT:
            raise ValueError(f"format {record['format']}, this version reads {_FORMAT}")
        if not all(isinstance(record[key], dict) for key in ("shapes", "kept", "sizes")):
            raise TypeError("its parts have other types")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / _SHAPE} is damaged or of another kind: {type(error).__name__}: {error}") from error
    return dict(record)


def _build(make: Callable[..., Module] | Module, record: dict[str, Any]) -> Module:
    if isinstance(make, nn.Module):
        module: Module = surgery.duplicate(make)
        return module
    arguments = record.get("arguments") or {}
    try:
        return make(**arguments) if isinstance(make, type) else make()
    except TypeError as error:
        name = getattr(make, "__name__", str(make))
        if isinstance(make, type) and name != (cut := str(record.get("class")).rpartition(".")[2]):
            raise ValueError(f"the folder holds a {record.get('class')}, got the class {name}: give {cut}") from error
        raise ValueError(f"{name} cannot be built with the arguments {arguments}: {error}; give a function that builds it") from error


def _compare(module: nn.Module, record: dict[str, Any], folder: Path) -> None:
    """Raise ValueError if the built module is not of the class and shapes that were shrunk."""
    shapes = {name: list(tensor.shape) for name, tensor in surgery.tensors(module).items()}
    differing = sorted(name for name in shapes.keys() | record["shapes"].keys() if shapes.get(name) != record["shapes"].get(name))
    if _class_of(module).rpartition(".")[2] != str(record.get("class")).rpartition(".")[2]:
        raise ValueError(f"{folder} holds a {record.get('class')}, got a {_class_of(module)}")
    if differing:
        first = differing[0]
        raise ValueError(
            f"{folder} was cut from another {type(module).__name__}: {first} had shape {record['shapes'].get(first)}, here "
            f"{shapes.get(first)} "
            f"({len(differing)} tensors differ)"
        )


def _state(path: Path) -> Any:
    archive.check(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling arbitrary bytes may raise any error
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
