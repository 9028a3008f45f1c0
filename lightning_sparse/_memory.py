"""The memory of a step's intermediate results, which the next step needs again."""

from __future__ import annotations

import torch

_BLOCK = (32 << 20) - (64 << 10)  # bytes: glibc takes no thresholds from blocks of 32 MiB and more


def keep_freed() -> None:
    """Let malloc keep up to 64 MB that is free, for the rest of the process, instead of returning it to the system.

    glibc maps a large block anew each time, and trims the heap by what is free at its top, until a larger block has been
    freed: then a page fault for every 4 KB of each intermediate result costs several times the arithmetic. Freeing one
    block that was never touched raises both thresholds. Other allocators take no notice.
    """
    torch.empty(_BLOCK, dtype=torch.uint8)
