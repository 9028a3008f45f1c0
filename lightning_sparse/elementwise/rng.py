"""Draw random numbers in the order of a tensor's memory, from seeded generators or from a counter."""

from __future__ import annotations

import hashlib

import torch
from numpy.random import SFC64
from torch import Tensor, nn

_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)  # multipliers of a 32-bit mixer of low bias (C. Wellons' hash prospector)


def generator_for(device: torch.device, *key: int) -> torch.Generator:
    """Return a generator seeded by ``key``: equal keys give equal draws."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") % 2**63)


def random_words(count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Draw ``count`` uniform uint16 numbers: four from each 64-bit draw, which costs far less than floats do."""
    size = -(-count // 4)
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator).view(torch.uint16)[:count]
    seed = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
    return torch.from_numpy(SFC64(seed).random_raw(size).view("uint16"))[:count]


def normal_like(tensor: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw N(0, 1) numbers in the shape and memory order of ``tensor``, because torch draws in any other order far more slowly."""
    if _is_row_major(tensor):
        return torch.empty_like(tensor).normal_(generator=generator)
    return in_order(torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device).normal_(generator=generator), tensor)


def in_order(flat: Tensor, like: Tensor) -> Tensor:
    """View ``flat`` in the shape and memory order of ``like``, so that both can be cut into chunks."""
    return flat.view(like.shape) if _is_row_major(like) else flat.as_strided(like.shape, like.stride())


def _is_row_major(tensor: Tensor) -> bool:
    """Return True for a row-major tensor, and for tensors without an order that could be followed."""
    if tensor.is_contiguous() or type(tensor) not in (Tensor, nn.Parameter):
        return True
    return not torch.ops.aten.is_non_overlapping_and_dense(tensor)


# -- from a counter, inside a compiled kernel -----------------------------------------------------------------------------


def counter_words(like: Tensor, start: int | Tensor, first: int | Tensor, second: int | Tensor) -> Tensor:
    """Hash the numbers ``start``, ``start + 1``, ... of the elements of ``like`` under two keys to whole numbers below 65,536.

    The result is float32 or wider; all arguments are 32-bit words, as int32. There are two rounds with a key each, because the
    blocks that two keys of a single round hash can be one block in another order.
    """
    number = torch.arange(like.numel(), dtype=torch.int32, device=like.device).view(like.shape) + start
    mixed = _mix(_mix(number ^ first) + second)
    return (mixed & 0xFFFF).to(torch.promote_types(like.dtype, torch.float32))


def _mix(x: Tensor) -> Tensor:
    """Apply a bijection of 32-bit words in which each bit of ``x`` changes each bit with a chance of about a half."""
    x = (x ^ (x >> 16 & 0xFFFF)) * _FIRST  # the shift is arithmetic
    x = (x ^ (x >> 15 & 0x1FFFF)) * _SECOND
    return x ^ (x >> 16 & 0xFFFF)


def counter_keys(generator: torch.Generator) -> tuple[int, int]:
    """Return two 32-bit keys made of the generator's seed."""
    seed = generator.initial_seed()
    return as_int32(seed), as_int32(seed >> 32)


def as_int32(word: int) -> int:
    """Return the lowest 32 bits of ``word`` as an int32."""
    return (word + (1 << 31)) % (1 << 32) - (1 << 31)
