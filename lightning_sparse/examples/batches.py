"""Batches cut from tensors in memory: no workers, no copies of single samples."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


class Batches:
    """Batches ``(x, y)`` cut from tensors in memory, in their order: no workers, no copies of single samples.

    The last batch may be smaller.

    Args:
        x: the samples.
        y: their labels.
        batch_size: samples in a batch.
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
    """Batches in an order that depends on the seed and the epoch alone, so that a resumed run repeats it.

    Args:
        x: the samples.
        y: their labels.
        batch_size: samples in a batch.
        seed: of the order.
        shift: each image of an x of shape (count, channels, height, width) is moved by up to ``shift`` pixels in each
            direction, anew in each epoch, by the same seed.
        fill: the value of what comes into a moved image.
    """

    batch_sampler = None

    def __init__(self, x: Tensor, y: Tensor, batch_size: int, seed: int, shift: int = 0, fill: float = 0.0) -> None:
        super().__init__(x, y, batch_size)
        self.seed, self.epoch, self.shift, self.fill = seed, 0, shift, fill
        self.sampler = self  # where the Trainer looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        offsets = torch.randint(2 * self.shift + 1, (len(self.x), 2), generator=self._generator(2**40)) if self.shift else None
        for part in self.order().split(self.batch_size):
            x = self.x[part]
            yield x if offsets is None else moved(x, offsets[part], self.shift, self.fill), self.y[part]

    def order(self) -> Tensor:
        return torch.randperm(len(self.x), generator=self._generator(0))

    def _generator(self, apart: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch + apart) % 2**63)


def moved(x: Tensor, by: Tensor, most: int, fill: float) -> Tensor:
    """Images (count, channels, height, width), moved up and left by as many pixels as ``by``, of shape (count, 2), less ``most``."""
    height, width = x.shape[-2:]
    windows = nn.functional.pad(x, [most] * 4, value=fill).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(x)), :, by[:, 0], by[:, 1]]
