"""Find a weight of 1 / N, with N the number of labels in the training set, from the losses of the first step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_sparse._labels import LabelCount, near_whole


class PerLabel:
    """Counts the labels of batches until 1 / N is asked for: samples, or the tokens, windows or pixels that the loss averages over."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Reset before a new fit."""
        self.value: float | None = None
        self._labels, self._batches, self._doubt = 0.0, 0, ""
        self._count: LabelCount | None = None

    @property
    def is_open(self) -> bool:
        """Return True if nothing was found yet."""
        return self.value is None

    def begin(self, batch: Any) -> None:
        """Start counting before a batch's forward."""
        if self.is_open:
            self._close_batch(1.0)
            self._count = LabelCount()
            self._count.begin(batch)

    def listen(self, loss: Tensor) -> None:
        """Record the loss before its backward."""
        if self.is_open and self._count is not None:
            self._count.listen(loss)

    def end(self, scale: float) -> None:
        """Count the batch's labels after the backward of a loss that was multiplied by ``scale``."""
        if self.is_open:
            self._close_batch(scale)

    def _close_batch(self, scale: float) -> None:
        if self._count is not None:
            count = self._count.count(scale)
            self._doubt = self._doubt or self._count.doubt
            if math.isfinite(count):
                self._labels, self._batches = self._labels + count, self._batches + 1
        self._count = None

    def settle(self, total: Callable[[Tensor], Tensor], batches: float, form: str) -> tuple[float, str, str]:
        """Return 1 / N over all ``batches`` of an epoch, a warning ("" for none) and a text about what was found; a collective.

        ``total`` sums a tensor over the processes.
        """
        self._close_batch(1.0)
        mean = torch.tensor(self._labels / max(self._batches, 1), dtype=torch.float64)
        everywhere = float(total(mean.float()))
        labels = max(near_whole(everywhere * batches), 1.0)
        self.value = 1.0 / labels
        doubt = (
            f"{form} cannot read from the loss how many labels it averages over; {self._doubt}. It uses kl_weight = 1 / {labels:.0f}, "
            "from all batches of an epoch; if that is wrong, give kl_weight: 1 / the number of labels (tokens, windows, pixels) in the "
            "training set"
        )
        found = f"{form}: kl_weight is 1 / {labels:.0f}, by {everywhere:g} labels in each of {batches:.0f} batches"
        return self.value, doubt if self._doubt else "", found
