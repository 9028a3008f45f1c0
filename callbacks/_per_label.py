"""A weight of 1 / N, N being the labels that the training set holds: found from the losses of the first step."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_sparse._labels import LabelCount, near_whole


class PerLabel:
    """Counts the labels of batches until it is asked for 1 / N: samples, or tokens, windows, pixels where the loss averages over them."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Before a new fit."""
        self.value: float | None = None
        self._labels, self._batches, self._doubt = 0.0, 0, ""
        self._count: LabelCount | None = None

    @property
    def is_open(self) -> bool:
        """Nothing was found yet."""
        return self.value is None

    def begin(self, batch: Any) -> None:
        """Before a batch's forward."""
        if self.is_open:
            self._close_batch(1.0)
            self._count = LabelCount()
            self._count.begin(batch)

    def listen(self, loss: Tensor) -> None:
        """Before the loss's backward."""
        if self.is_open and self._count is not None:
            self._count.listen(loss)

    def end(self, scale: float) -> None:
        """After the backward of a loss that was multiplied by ``scale``."""
        if self.is_open:
            self._close_batch(scale)

    def _close_batch(self, scale: float) -> None:
        if self._count is not None:
            count = self._count.count(scale)
            self._doubt = self._doubt or self._count.doubt
            if math.isfinite(count):
                self._labels, self._batches = self._labels + count, self._batches + 1
        self._count = None

    def settle(self, trainer: Trainer, steps: float, form: str) -> float:
        """1 / N at the first of ``steps`` optimiser steps; every rank calls this."""
        self._close_batch(1.0)
        mean = torch.tensor(self._labels / max(self._batches, 1), dtype=torch.float64)
        everywhere = float(trainer.strategy.reduce(mean.float().to(trainer.strategy.root_device), reduce_op="sum"))
        batches = batches_of_run(trainer, steps)
        labels = max(near_whole(everywhere * batches), 1.0)
        self.value = 1.0 / labels
        if self._doubt:
            rank_zero_warn(
                f"{form} cannot read from the loss how many labels it averages over; {self._doubt}. kl_weight is 1 / {labels:.0f} of that, "
                "over all batches of an epoch; if it is wrong, give kl_weight: 1 / the number of labels (tokens, windows, pixels) in the "
                "training set"
            )
        rank_zero_info(f"{form}: kl_weight is 1 / {labels:.0f}, by {everywhere:g} labels in each of {batches:.0f} batches")
        return self.value


def batches_of_run(trainer: Trainer, steps: float) -> float:
    """Batches of an epoch, or of the run where its loader has no length; inf where that has no end either."""
    batches = float(trainer.num_training_batches)
    return batches if math.isfinite(batches) else steps * trainer.accumulate_grad_batches
