"""Compact files: of each tensor a bit mask and the non-zero values, in safetensors, with a manifest and checksums.

A file holds for each tensor ``NAME.mask`` (one bit per element, 1 for a value that is kept, most significant bit first) and
``NAME.values``, or ``NAME.dense`` where that is smaller. The metadata hold a manifest in JSON: format, and for each name shape, data
type, kind and SHA-256 of the stored bytes, or the name that it is tied to; and the manifest's own SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_sparse import _checks
from lightning_sparse.export import _extra
from lightning_sparse.export.conversion import refuse_quantised

_FORMAT = "lightning-sparse compact 1"
_CUT = "is damaged or cut"


def save_compact(state: nn.Module | Mapping[str, Any], path: str | Path, dtype: str | None = None) -> Path:
    """Write a module's ``state_dict`` as bit masks and values, and return the path. The file appears whole or not at all.

    Tied tensors are stored once. NaN and integers are kept as they are; -0.0 becomes 0.0.

    Raises ValueError for a folder as path, for entries that are not dense tensors (quantised layers, a whole checkpoint), and for values
    that overflow in fp16.

    Args:
        state: a module (sparse layers of this package give their dense matrices) or a state dict.
        path: the file to write.
        dtype: None keeps all values (-0.0 becomes 0.0); "fp16" rounds floating-point values to 16 bits, and :func:`load_compact`
            gives them back in the original data type.
    """
    call = "save_compact(state, path)"
    _checks.file(path, "path", call, "model.safetensors")
    if not isinstance(state, Mapping):
        _checks.module(state, call, " or a state dict")
    if dtype not in (None, "fp16"):
        raise ValueError(f"dtype must be None (equal values) or 'fp16', got {dtype!r}")
    if isinstance(state, nn.Module):
        refuse_quantised(state, "save_compact")
        state = state.state_dict()
    _check_dense(state)
    stored: dict[str, Tensor] = {}
    manifest: dict[str, Any] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in state.items():
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            manifest[name] = {"tied": first[key]}
            continue
        first[key] = name
        parts = _parts(name, tensor.detach().cpu().contiguous(), dtype)
        stored |= parts
        sums = {part: _sum(part_tensor) for part, part_tensor in parts.items()}
        manifest[name] = {"shape": list(tensor.shape), "dtype": _word(tensor.dtype), "parts": sums}
    text = json.dumps({"format": _FORMAT, "tensors": manifest})
    return _write(stored, {"manifest": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}, Path(path))


def load_compact(path: str | Path) -> dict[str, Tensor]:
    """Read a compact file into a state dict for ``module.load_state_dict``. Tied tensors are one tensor under several names.

    Raises FileNotFoundError, and ValueError naming the file if it is of another kind, cut, or if one of its bits is not what was written.
    """
    _checks.path(path, "path", "load_compact(path)")
    safetensors = _extra.load("safetensors", "load_compact")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except Exception as error:  # safetensors raises its own class, which it does not export everywhere
        raise ValueError(f"{path} {_CUT}, or not a safetensors file: {' '.join(str(error).split())[:200]}") from error
    if "manifest" not in metadata or "sha256" not in metadata:
        raise ValueError(f"{path} is not a compact file of save_compact: it has no manifest, or is damaged")
    text = metadata["manifest"]
    if hashlib.sha256(text.encode()).hexdigest() != metadata["sha256"]:
        raise ValueError(f"{path} {_CUT}: its manifest differs from its checksum")
    manifest = json.loads(text)
    if manifest["format"] != _FORMAT:
        raise ValueError(f"{path} has the format {manifest['format']!r}; this version reads {_FORMAT!r}")
    parts = {part: total for entry in manifest["tensors"].values() for part, total in entry.get("parts", {}).items()}
    if parts.keys() != stored.keys():
        raise ValueError(f"{path} {_CUT}: it lacks or has extra {sorted(parts.keys() ^ stored.keys())[:3]}")
    if damaged := [part for part, total in parts.items() if _sum(stored[part]) != total]:
        raise ValueError(f"{path} {_CUT}: {damaged[0]!r} differs from its checksum")
    state: dict[str, Tensor] = {}
    for name, entry in manifest["tensors"].items():
        state[name] = state[entry["tied"]] if "tied" in entry else _whole(name, entry, stored)
    return state


def _check_dense(state: Mapping[str, Any]) -> None:
    """Raise ValueError for an entry that is no dense tensor; name the state dict within a checkpoint."""
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_quantized:
            continue
        kind = f"a {tensor.layout} or quantised tensor" if isinstance(tensor, Tensor) else f"of type {type(tensor).__name__}"
        inner = [key for key, value in state.items() if isinstance(value, Mapping) and any(isinstance(t, Tensor) for t in value.values())]
        key = "state_dict" if "state_dict" in inner else next(iter(inner), None)
        cure = "give the state dict before quantisation" if key is None else f"this is a checkpoint, give checkpoint[{key!r}]"
        raise ValueError(f"compact files hold dense tensors, but {name!r} is {kind}: {cure}")


def _parts(name: str, tensor: Tensor, dtype: str | None) -> dict[str, Tensor]:
    """Return the tensors to store: mask and values, or the dense tensor if it takes fewer bytes."""
    if tensor.is_complex():
        return {f"{name}.dense": torch.view_as_real(tensor).contiguous()}
    flat = tensor.reshape(-1)
    kept = flat != 0  # -0.0 is a zero here; masked weights often have it
    values = _rounded(name, flat, dtype)
    taken = values[kept]
    if kept.numel() / 8 + taken.nbytes >= values.nbytes:
        return {f"{name}.dense": values.reshape(tensor.shape)}
    return {f"{name}.mask": torch.from_numpy(np.packbits(kept.numpy())), f"{name}.values": taken}


def _rounded(name: str, flat: Tensor, dtype: str | None) -> Tensor:
    if dtype is None or not flat.is_floating_point() or flat.element_size() <= 2:
        return flat
    half = flat.half()
    if bool((half.isinf() & flat.isfinite()).any()):
        largest = flat[flat.isfinite()].abs().max().item()
        raise ValueError(f"fp16 holds values up to 65504, but {name!r} has {largest:g}: use dtype=None, which keeps all values")
    return half


def _whole(name: str, entry: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Tensor:
    dtype, shape = getattr(torch, entry["dtype"]), entry["shape"]
    if (dense := stored.get(f"{name}.dense")) is not None:
        return torch.view_as_complex(dense) if dtype.is_complex else dense.to(dtype).reshape(shape)
    size = int(np.prod(shape, dtype=np.int64))
    kept = torch.from_numpy(np.unpackbits(stored[f"{name}.mask"].numpy(), count=size)).bool()
    values = stored[f"{name}.values"]
    flat = torch.zeros(size, dtype=dtype)
    flat[kept] = values.to(dtype)
    return flat.reshape(shape)


def _sum(tensor: Tensor) -> str:
    """Return the SHA-256 of data type, shape and bytes."""
    found = hashlib.sha256(f"{_word(tensor.dtype)} {list(tensor.shape)}".encode())
    found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return found.hexdigest()


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write(stored: dict[str, Tensor], metadata: dict[str, str], path: Path) -> Path:
    packed: bytes = _extra.load("safetensors.torch", "save_compact").save({name: t.contiguous() for name, t in stored.items()}, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        fresh.write_bytes(packed)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
    return path
