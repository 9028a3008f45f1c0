"""The memory of a step's intermediate results, which the next step needs again."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

_BLOCK = (32 << 20) - (64 << 10)  # bytes: glibc takes no thresholds from blocks of 32 MiB and more


def keep_freed() -> None:
    """Let malloc keep up to 64 MB that is free, for the rest of the process, instead of returning it to the system.

    glibc maps a large block anew each time, and trims the heap by what is free at its top, until a larger block has been
    freed: then a page fault for every 4 KB of each intermediate result costs several times the arithmetic. Freeing one
    block that was never touched raises both thresholds. Other allocators take no notice.
    """
    torch.empty(_BLOCK, dtype=torch.uint8)


class Kept:
    """Blocks that malloc maps anew each time, whatever its thresholds: kept here from one step to the next.

    On the CPU, from 32 MB on: a page fault for every 4 KB of them costs more than what is done with them.
    """

    def __init__(self) -> None:
        self._blocks: dict[Hashable, Tensor] = {}

    def empty_like(self, tensor: Tensor, key: Hashable) -> Tensor:
        """Memory for what is like ``tensor``; if it is large, that of the last time under this ``key``."""
        if not tensor.is_cpu or tensor.numel() * tensor.element_size() < _BLOCK:
            return torch.empty_like(tensor)
        block = self._blocks.get(key)
        if block is None or (block.dtype, block.shape, block.stride()) != (tensor.dtype, tensor.shape, tensor.stride()):
            block = self._blocks[key] = torch.empty_like(tensor)
        return block

    def clear(self) -> None:
        """Let all of it go."""
        self._blocks.clear()
