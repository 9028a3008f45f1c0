"""Work on the parts of weights that FSDP2 splits over processes (DTensors), and gather or sum over all parts.

For ordinary tensors everything here is the identity. Functions called *collective* wait for the other processes that hold
parts of the tensor: call them on every rank, or on none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.elementwise.pieces import PLAIN, chunks

_CHUNK = 1 << 20  # weights whose mask is applied at a time


def is_sharded(tensor: Any) -> bool:
    """Return whether ``tensor`` is a DTensor, split or repeated over a mesh of processes."""
    module = sys.modules.get("torch.distributed.tensor")  # because DTensors exist only once it is imported
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Any) -> Tensor:
    """Return the part of a detached ``tensor`` that this process holds, in the same memory; the tensor itself if it is whole."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return part


def local_parts(tensors: Sequence[Any]) -> list[Tensor]:
    """Return the parts of ``tensors`` that this process holds; plain ones as they are."""
    return [tensor if type(tensor) in PLAIN else local_part(tensor.detach()) for tensor in tensors]


def shard_like(part: Tensor, whole: Any, shape: torch.Size | None = None) -> Tensor:
    """Wrap ``part``, one value for each in the local part of ``whole``, as a tensor that is split as ``whole`` is.

    ``shape`` is that of all parts together, if it is not that of ``whole``.
    """
    if not is_sharded(whole):
        return part
    from torch.distributed.tensor import DTensor

    layout = {"shape": whole.shape, "stride": whole.stride()}
    if shape is not None:
        layout = {"shape": shape, "stride": torch.empty(shape, device="meta").stride()}
    split: Tensor = DTensor.from_local(part, whole.device_mesh, whole.placements, run_check=False, **layout)
    return split


@torch.no_grad()
def map_shards(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Apply ``function`` to the local parts of ``tensors``, which are split alike; the result is split as they are."""
    return shard_like(function(*(local_part(tensor.detach()) for tensor in tensors)), tensors[0])


@torch.no_grad()
def apply_mask_(tensor: Tensor, mask: Tensor) -> None:
    """Zero ``tensor`` where the boolean ``mask``, split alike, is False.

    By a product in chunks, because a masked fill costs several times as much, and because torch converts the uint8 mask to
    floats: a large temporary would be allocated each time.
    """
    part, kept = local_part(tensor.detach()), local_part(mask).view(torch.uint8)
    for values, ones in [(part, kept)] if part.numel() <= _CHUNK else chunks(part, kept, size=_CHUNK):
        values.mul_(ones)


@torch.no_grad()
def apply_masks_(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Call :func:`apply_mask_` for each (tensor, mask); small whole ones in one call."""
    tensors, masks = [], []
    for tensor, mask in pairs:
        if type(tensor) in PLAIN and type(mask) in PLAIN and tensor.numel() <= _CHUNK:
            tensors.append(tensor)
            masks.append(mask.view(torch.uint8))
        else:
            apply_mask_(tensor, mask)
    if tensors:
        torch._foreach_mul_(tensors, masks)


@torch.no_grad()
def gather_where(tensor: Tensor, where: Tensor) -> Tensor:
    """Return the values of the whole ``tensor`` at ``where``, in row-major order, on the CPU: a collective."""
    return full_tensor(tensor.detach())[full_tensor(where)].cpu()


@torch.no_grad()
def scatter_to_zeros_(tensor: Tensor, values: Tensor) -> None:
    """Write ``values``, in row-major order, where the whole ``tensor`` is zero; undoes :func:`gather_where` there; a collective."""
    whole = full_tensor(tensor.detach())
    whole[whole == 0] = values.to(whole)
    if is_sharded(tensor):
        local_part(tensor.detach()).copy_(cut_like(whole, tensor))


def sum_shards(value: Tensor, of: Any) -> Tensor:
    """Sum ``value`` over the processes that hold different parts of ``of``: a collective."""
    return _reduced(value, of, "sum")


def max_shards(value: Tensor, of: Any) -> Tensor:
    """Return the largest ``value`` of the processes that hold parts of ``of``: a collective."""
    return _reduced(value, of, "max")


def _reduced(value: Tensor, of: Any, how: str) -> Tensor:
    if not is_sharded(of):
        return value
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Replicate() if placement.is_replicate() else Partial(how) for placement in of.placements]
    reduced: Tensor = DTensor.from_local(value, of.device_mesh, placements, run_check=False).full_tensor()
    return reduced


def full_tensor(tensor: Any) -> Tensor:
    """Return the whole of a detached ``tensor`` on every process: a collective."""
    whole: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return whole


@torch.no_grad()
def cut_like(whole: Tensor, of: Any) -> Tensor:
    """Return this process's part of ``whole``, which every process holds, cut as ``of`` is."""
    if not is_sharded(of):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    repeated = DTensor.from_local(whole, of.device_mesh, [Replicate()] * of.device_mesh.ndim, run_check=False)
    return local_part(repeated.redistribute(placements=of.placements))


def fsdp_modules(module: nn.Module) -> list[Any]:
    """Return the parts of ``module`` whose weights FSDP2 gathers before a forward."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None else [unit for unit in module.modules() if isinstance(unit, kind)]
