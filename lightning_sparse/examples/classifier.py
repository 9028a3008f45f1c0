"""What the example networks share: cross-entropy, accuracy, Adam and a learning rate that falls to 0."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lightning_sparse import _checks, _docstrings

_DECAYS = ("cosine", "linear")


class Classifier(LightningModule):
    """A network ``layers`` that maps x to class scores, trained on cross-entropy by Adam.

    The learning rate falls to 0. Logs ``{train,val,test}/loss`` and ``{val,test}/accuracy``. Raises ValueError for an unknown
    ``decay``, and for a ``restart`` outside (0, 1) or of a linear one.

    Args:
        lr: the learning rate at the start.
        decay: "cosine": it falls along half a cosine, counted in optimiser steps; "linear": once an epoch.
        fused: Adam's own switch, about 1.5 times faster per epoch on a CPU.
        restart: a share of the run, where half a cosine ends and another begins, for the fine-tuning of a frozen support:
            weights come to rest at zero as the steps shrink, and what is left is trained from a full rate again.
    """

    layers: nn.Module

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        _docstrings.complete(cls)

    def __init__(self, lr: float, decay: str = "cosine", fused: bool = False, restart: float | None = None) -> None:
        super().__init__()
        if decay not in _DECAYS:
            raise ValueError(f"decay must be one of {list(_DECAYS)}, got {decay!r}")
        if restart is not None and decay != "cosine":
            raise ValueError(f"restart={restart!r} is for decay='cosine', got decay={decay!r}")
        self.restart = None if restart is None else _checks.between("restart", restart, 0, 1)
        self.lr, self.decay, self.fused = _checks.positive("lr", lr), decay, _checks.truth("fused", fused)

    def __setattr__(self, name: str, value: Any) -> None:
        """Lightning notes which hook it is in some forty times a step; nn.Module's way of setting takes 10 us for each."""
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.layers(x)
        return scores

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        if self._is_logged():
            self.log("train/loss", loss)
        return loss

    def _is_logged(self) -> bool:
        """At the steps that loggers take and at an epoch's end: ``log`` at each one is a good part of LeNet-300-100's step."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return (self.trainer.global_step + 1) % every == 0 or self.trainer.is_last_batch

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
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr, fused=self.fused or None)
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError(f"{type(self).__name__}'s learning rate falls over the run's length: give the Trainer max_epochs or max_steps")
        if self.decay == "cosine":
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._cosine(optimizer, max(int(steps), 1)), "interval": "step"}}
        epochs = max(1, round(steps * self.trainer.accumulate_grad_batches / self.trainer.num_training_batches))
        linear = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=epochs)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": linear, "interval": "epoch"}}

    def _cosine(self, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        if self.restart is None:
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, partial(cosines, total=steps, restart=self.restart))


def cosines(step: int, total: int, restart: float) -> float:
    """Half a cosine from 1 to 0 over the first ``restart`` of ``total`` steps, another over the rest; 0 from ``total`` on."""
    turn = round(restart * total)
    begin, end = (0, turn) if step < turn or turn == total else (turn, total)
    return (1 + math.cos(math.pi * min((step - begin) / max(end - begin, 1), 1.0))) / 2
