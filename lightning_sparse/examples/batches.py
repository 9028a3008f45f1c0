"""Batches cut from tensors in memory: no workers, no copies of single samples."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]


class Batches:
    """Batches ``(x, y)`` cut from tensors in memory, in their order: no workers, no copies of single samples.

    The last batch may be smaller.
    """

    def __init__(self, x: Tensor, y: Tensor, batch_size: int) -> None:
        self.x, self.y, self.batch_size = x, y, batch_size

    def __len__(self) -> int:
        return -(-len(self.x) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for part in self.order().split(self.batch_size):
            yield self.x[part], self.y[part]

    def order(self) -> Tensor:
        """The indices of this epoch's samples."""
        return torch.arange(len(self.x))


class ShuffledBatches(Batches):
    """Batches in an order that depends on the seed and the epoch alone, so that a resumed run repeats it."""

    batch_sampler = None

    def __init__(self, x: Tensor, y: Tensor, batch_size: int, seed: int) -> None:
        super().__init__(x, y, batch_size)
        self.seed, self.epoch = seed, 0
        self.sampler = self  # where the Trainer looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self.epoch = epoch

    def order(self) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        return torch.randperm(len(self.x), generator=generator)
