"""Random numbers in the order of a tensor's memory, and the generators that they come from."""

from __future__ import annotations

import hashlib

import torch
from numpy.random import SFC64
from torch import Tensor, nn


def words(count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Random uint16, each of the 65,536 with equal chance: a quarter of a 64-bit draw, which costs far less than a float does."""
    size = -(-count // 4)
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator).view(torch.uint16)[:count]
    seed = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
    return torch.from_numpy(SFC64(seed).random_raw(size).view("uint16"))[:count]


def normal_like(tensor: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """N(0, 1) in the shape of ``tensor`` and in its order in memory: torch draws in any other order at a fraction of the speed."""
    if _usual(tensor):
        return torch.empty_like(tensor).normal_(generator=generator)
    return in_order(torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device).normal_(generator=generator), tensor)


def _usual(tensor: Tensor) -> bool:
    """Row by row in memory, or in no order that could be followed."""
    if tensor.is_contiguous() or type(tensor) not in (Tensor, nn.Parameter):
        return True
    return not torch.ops.aten.is_non_overlapping_and_dense(tensor)


def in_order(flat: Tensor, like: Tensor) -> Tensor:
    """``flat`` in the shape of ``like`` and in its order in memory, so that both can be worked on in pieces."""
    return flat.view(like.shape) if _usual(like) else flat.as_strided(like.shape, like.stride())


def stream(device: torch.device, *key: int) -> torch.Generator:
    """A generator of its own for each ``key``: the same draws whenever and wherever that key comes up again."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") % 2**63)
