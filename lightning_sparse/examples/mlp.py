"""A multi-layer perceptron for classification."""

from __future__ import annotations

import itertools

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lightning_sparse import _checks


class MLP(LightningModule):
    """Linear layers of the given widths with ReLU between them, trained on cross-entropy by Adam.

    The learning rate falls from ``lr`` to 0 along half a cosine, counted in optimiser steps. ``sizes`` runs from the
    inputs to the classes; x is flattened to (batch, sizes[0]). Logs ``{train,val,test}/loss`` and ``{val,test}/accuracy``.
    Raises ValueError for fewer than two sizes.
    """

    def __init__(self, sizes: list[int], lr: float = 1e-3) -> None:
        super().__init__()
        if len(sizes) < 2:
            raise ValueError(f"sizes must name at least the inputs and the classes, got {sizes!r}")
        for size in sizes:
            _checks.positive("each of sizes", size)
        self.lr = _checks.positive("lr", lr)
        self.save_hyperparameters()
        pairs = itertools.pairwise(sizes)
        layers = [layer for pair in pairs for layer in (nn.Linear(*pair), nn.ReLU())]
        self.layers = nn.Sequential(nn.Flatten(), *layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.layers(x)
        return scores

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self._evaluate("val", *batch)

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self._evaluate("test", *batch)

    def predict_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        scores: Tensor = self(batch[0])
        return scores.argmax(1)

    def _evaluate(self, stage: str, x: Tensor, y: Tensor) -> None:
        scores = self(x)
        self.log(f"{stage}/loss", nn.functional.cross_entropy(scores, y), batch_size=len(y))
        self.log(f"{stage}/accuracy", (scores.argmax(1) == y).float().mean(), batch_size=len(y))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("MLP's learning rate falls over the run's length: give the Trainer max_epochs or max_steps")
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(int(steps), 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
