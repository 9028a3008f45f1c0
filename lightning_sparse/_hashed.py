"""Random words from a counter: a hash of each weight's number under a batch's two keys, made where it is used."""

from __future__ import annotations

import torch
from torch import Tensor

_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)  # multipliers of a 32-bit mixer of low bias (C. Wellons' hash prospector)


def words(like: Tensor, start: int | Tensor, first: int | Tensor, second: int | Tensor) -> Tensor:
    """For each element of ``like`` one of 65,536 whole numbers, in float32 or wider: of its number, from ``start`` on, and two keys.

    All numbers are 32-bit words, as int32. Two rounds with a key each, since the blocks that two keys of one round hash can
    be the same block in another order.
    """
    number = torch.arange(like.numel(), dtype=torch.int32, device=like.device).view(like.shape) + start
    mixed = _mix(_mix(number ^ first) + second)
    return (mixed & 0xFFFF).to(torch.promote_types(like.dtype, torch.float32))


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words in which each bit of ``x`` changes each bit with a chance of about a half."""
    x = (x ^ (x >> 16 & 0xFFFF)) * _FIRST  # the shift is arithmetic
    x = (x ^ (x >> 15 & 0x1FFFF)) * _SECOND
    return x ^ (x >> 16 & 0xFFFF)


def keys(generator: torch.Generator) -> tuple[int, int]:
    """Two 32-bit words, of the seed that ``generator`` was given."""
    seed = generator.initial_seed()
    return signed(seed), signed(seed >> 32)


def signed(word: int) -> int:
    """The lowest 32 bits of ``word`` as an int32."""
    return (word + (1 << 31)) % (1 << 32) - (1 << 31)
