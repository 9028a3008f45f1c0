"""Draw random numbers from a counter, inside a compiled kernel."""

from __future__ import annotations

import torch
from torch import Tensor

_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)  # multipliers of a 32-bit mixer of low bias (C. Wellons' hash prospector)


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
