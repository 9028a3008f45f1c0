"""Loaders of batches from tensors in memory, without worker processes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


class Batches:
    """Batches ``(x, y)`` of tensors in memory, in order. Indexes whole batches, not single samples, without worker processes.

    The last batch may be smaller.

    Args:
        x: the samples.
        y: the labels.
        batch_size: samples per batch.
    """

    def __init__(self, x: Tensor, y: Tensor, batch_size: int) -> None:
        self.x, self.y, self.batch_size = x, y, batch_size

    def __len__(self) -> int:
        return -(-len(self.x) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for part in self.order().split(self.batch_size):
            yield self.x[part], self.y[part]

    def order(self) -> Tensor:
        """Return the sample indices of this epoch."""
        return torch.arange(len(self.x))


class ShuffledBatches(Batches):
    """Shuffled batches. The order depends only on seed and epoch, so a resumed run repeats it.

    Args:
        x: the samples.
        y: the labels.
        batch_size: samples per batch.
        seed: seed of the order and of the shifts.
        shift: shift each image by up to ``shift`` pixels in each direction, randomly in each epoch; x must then have the
            shape (count, channels, height, width).
        fill: value of the pixels outside the original image.
    """

    batch_sampler = None

    def __init__(self, x: Tensor, y: Tensor, batch_size: int, seed: int, shift: int = 0, fill: float = 0.0) -> None:
        super().__init__(x, y, batch_size)
        self.seed, self.epoch, self.shift, self.fill = seed, 0, shift, fill
        self.sampler = self  # because the Trainer calls set_epoch on the sampler

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; the Trainer calls this before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        offsets = torch.randint(2 * self.shift + 1, (len(self.x), 2), generator=self._generator(2**40)) if self.shift else None
        for part in self.order().split(self.batch_size):
            x = self.x[part]
            yield x if offsets is None else moved(x, offsets[part], self.shift, self.fill), self.y[part]

    def order(self) -> Tensor:
        return torch.randperm(len(self.x), generator=self._generator(0))

    def _generator(self, offset: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch + offset) % 2**63)


def moved(x: Tensor, by: Tensor, most: int, fill: float) -> Tensor:
    """Shift images (count, channels, height, width) up and left by ``by - most`` pixels; ``by`` has shape (count, 2)."""
    height, width = x.shape[-2:]
    windows = nn.functional.pad(x, [most] * 4, value=fill).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(x)), :, by[:, 0], by[:, 1]]
