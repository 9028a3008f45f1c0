"""A checksum to compare weights and zero masks between processes."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 18  # weights per chunk, because the integers of a chunk take a few MB
_MIX, _ZERO = 0x9E3779B97F4A7C15 - (1 << 64), 0x2545F4914F6CDD1D  # odd, so multiplication modulo 2^64 is invertible
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(w: Tensor, zeros: Tensor) -> Tensor:
    """Hash the bits of ``w``, the boolean ``zeros`` of the same shape, and their positions to one int64, in chunks."""
    bits, marks = w.detach().reshape(-1).view(_INTEGERS[w.element_size()]), zeros.reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=w.device)
    for start in range(0, len(bits), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64, copy=True).add_(marks[start : start + _CHUNK], alpha=_ZERO).mul_(_MIX)
        position = torch.arange(start, start + len(part), device=w.device).mul_(2).add_(1)
        total += (part ^ (part >> 29)).mul_(position).sum()  # the shift keeps small differences from cancelling
    return total
