"""Weights that are split over processes (FSDP2's DTensors): elementwise work on the local part, sums over all parts.

For ordinary tensors everything here is the identity. Functions called *collective* wait for the other processes that hold
parts of the tensor: call them on every rank, or on none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse._pieces import pieces

PLAIN = (Tensor, nn.Parameter)
_PIECE = 1 << 20  # weights


def is_sharded(tensor: Any) -> bool:
    """``tensor`` is a DTensor, split or repeated over a mesh of processes."""
    module = sys.modules.get("torch.distributed.tensor")  # nobody has made one before somebody has imported it
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Tensor:
    """The part of a detached ``tensor`` that this process holds, in the same memory; the tensor itself if it is whole."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return part


def held_of(tensors: Sequence[Any]) -> list[Tensor]:
    """The parts of ``tensors`` that this process holds; plain ones as they are."""
    return [tensor if type(tensor) in PLAIN else local(tensor.detach()) for tensor in tensors]


def like(part: Tensor, whole: Any) -> Tensor:
    """``part``, one value for each in the local part of ``whole``, as a tensor that is split as ``whole`` is."""
    if not is_sharded(whole):
        return part
    from torch.distributed.tensor import DTensor

    layout = {"shape": whole.shape, "stride": whole.stride()}
    split: Tensor = DTensor.from_local(part, whole.device_mesh, whole.placements, run_check=False, **layout)
    return split


@torch.no_grad()
def elementwise(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``function`` of the local parts of ``tensors``, which are split alike; the result is split as they are."""
    return like(function(*(local(tensor.detach()) for tensor in tensors)), tensors[0])


@torch.no_grad()
def write(target: Tensor, source: Tensor) -> None:
    """Copy the values of ``source`` into ``target``, which is split alike; no gradient is recorded."""
    local(target.detach()).copy_(local(source.detach()))


@torch.no_grad()
def hold(tensor: Tensor, where: Tensor) -> None:
    """Put zeros everywhere but ``where`` (boolean, split as ``tensor`` is): by a product, which costs a fraction of a masked fill.

    In pieces, since torch makes floats of what it multiplies by: of more, memory is mapped anew each time.
    """
    for part, kept in pieces(local(tensor.detach()), local(where).view(torch.uint8), size=_PIECE):
        part.mul_(kept)


@torch.no_grad()
def hold_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """:func:`hold` of each tensor and its ``where``; those that are small and not split by one call."""
    tensors, marks = [], []
    for tensor, where in pairs:
        if type(tensor) in PLAIN and type(where) in PLAIN and tensor.numel() <= _PIECE:
            tensors.append(tensor)
            marks.append(where.view(torch.uint8))
        else:
            hold(tensor, where)
    if tensors:
        torch._foreach_mul_(tensors, marks)


@torch.no_grad()
def picked(tensor: Tensor, where: Tensor) -> Tensor:
    """The values of the whole ``tensor`` at ``where``, in the order of its rows, on the CPU: a collective."""
    return full(tensor.detach())[full(where)].cpu()


@torch.no_grad()
def put(tensor: Tensor, values: Tensor) -> None:
    """Put ``values`` in the order of rows where the whole ``tensor`` is zero: undoes :func:`picked` there; a collective."""
    whole = full(tensor.detach())
    whole[whole == 0] = values.to(whole)
    if is_sharded(tensor):
        local(tensor.detach()).copy_(part(whole, tensor))


def total(value: Tensor, of: Any) -> Tensor:
    """The sum of ``value`` over the processes that hold different parts of ``of``: a collective."""
    return _reduced(value, of, "sum")


def largest(value: Tensor, of: Any) -> Tensor:
    """The largest ``value`` of the processes that hold parts of ``of``: a collective."""
    return _reduced(value, of, "max")


def _reduced(value: Tensor, of: Any, how: str) -> Tensor:
    if not is_sharded(of):
        return value
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Replicate() if placement.is_replicate() else Partial(how) for placement in of.placements]
    reduced: Tensor = DTensor.from_local(value, of.device_mesh, placements, run_check=False).full_tensor()
    return reduced


def full(tensor: Any) -> Tensor:
    """The whole of a detached ``tensor`` on every process: a collective."""
    whole: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return whole


@torch.no_grad()
def part(whole: Tensor, of: Any) -> Tensor:
    """This process's part of ``whole``, which every process holds, cut as ``of`` is."""
    if not is_sharded(of):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    repeated = DTensor.from_local(whole, of.device_mesh, [Replicate()] * of.device_mesh.ndim, run_check=False)
    return local(repeated.redistribute(placements=of.placements))


def units(module: nn.Module) -> list[Any]:
    """The parts of ``module`` whose weights FSDP2 gathers before a forward."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None else [unit for unit in module.modules() if isinstance(unit, kind)]
