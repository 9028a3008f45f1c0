"""Reuse the memory of a step's intermediate results in the next step."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

LARGE = (32 << 20) - (64 << 10)  # bytes: glibc maps blocks of 32 MiB and more anew, whatever its thresholds


def raise_malloc_thresholds() -> None:
    """Let malloc keep up to 64 MB of free memory, for the rest of the process.

    Call it once, before training on a CPU, if large intermediate results make steps slow: glibc returns a freed block of more
    than its threshold to the system, and a page fault for every 4 KB of the next one then costs several times the arithmetic.
    Freeing one block that was never touched raises both thresholds. Other allocators take no notice.
    """
    torch.empty(LARGE, dtype=torch.uint8)


class BufferPool:
    """Keeps CPU buffers of 32 MB and more between steps, because malloc would map them anew every time."""

    def __init__(self) -> None:
        self._buffers: dict[Hashable, Tensor] = {}

    def empty_like(self, tensor: Tensor, key: Hashable) -> Tensor:
        """Return memory like ``tensor``; if it is large, the buffer that was returned last under ``key``."""
        if not tensor.is_cpu or tensor.numel() * tensor.element_size() < LARGE:
            return torch.empty_like(tensor)
        buffer = self._buffers.get(key)
        if buffer is None or (buffer.dtype, buffer.shape, buffer.stride()) != (tensor.dtype, tensor.shape, tensor.stride()):
            buffer = self._buffers[key] = torch.empty_like(tensor)
        return buffer

    def clear(self) -> None:
        """Release all buffers."""
        self._buffers.clear()
