"""Noise on a share of a batch's samples, with so much more variance: for each of them the same moments, at that share of the price."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def for_share(noise: Callable[[Tensor], Tensor], x: Tensor, share: float, generator: torch.Generator | None = None) -> Tensor:
    """``noise`` of about ``share`` of the samples ``x``, along dimension 0, times sqrt(samples / taken); 0 for the others.

    They stand in a row, which starts anywhere, the first following the last: each is taken with equal chance.
    """
    count, taken = len(x), max(1, round(share * len(x)))
    if taken >= count:
        return noise(x)
    start = int(torch.randint(count, (), generator=generator, device="cpu" if generator is None else generator.device))
    before = max(0, start + taken - count)  # of the taken, those that stand at the beginning
    part = x.narrow(0, start, taken) if not before else torch.cat([x.narrow(0, start, taken - before), x.narrow(0, 0, before)])
    found = noise(part) * (count / taken) ** 0.5
    front = 0 if before else start
    placed = functional.pad(found, [0, 0] * (found.dim() - 1) + [front, count - taken - front])
    return placed.roll(start, 0) if before else placed
