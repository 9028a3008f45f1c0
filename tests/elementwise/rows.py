"""Tensors of many sizes, for tests of functions on many tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def tensors_of(sizes: list[tuple[int, ...]]) -> list[Tensor]:
    """Draw a tensor of each size."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator) for size in sizes]


MIXED = tensors_of([(3, 5), (300, 300), (4, 2, 3, 3), (7,), (2, 2), (5, 6), (1, 1), (6, 3), (8, 2), (9,), (0, 4), (2, 9)])
