"""Base class of the example networks: cross-entropy, accuracy, Adam and a learning rate that decays to 0."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lightning_sparse import _checks, _docstrings

OPTIMIZERS = ("sgd", "adamw")
_DECAYS = ("cosine", "linear")


class Classifier(LightningModule):
    """A classifier trained with cross-entropy and Adam; the network ``layers`` maps x to class scores.

    The learning rate decays to 0. Logs ``{train,val,test}/loss`` and ``{val,test}/accuracy``. Raises ValueError for an unknown
    ``decay``, for a ``restart`` outside (0, 1), and for a ``restart`` with linear decay.

    Args:
        lr: the initial learning rate.
        decay: "cosine": half a cosine, updated every optimiser step; "linear": linear, updated every epoch.
        fused: use Adam's fused implementation, about 1.5 times faster per epoch on a CPU.
        restart: restart the cosine from ``lr`` after this share of the run, to fine-tune a frozen support: small steps at the
            end of the first cosine settle weights at zero, and the second cosine trains the remaining weights.
    """

    layers: nn.Module

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
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
        """Set an attribute; set ``_current_fx_name`` directly."""
        # because Lightning sets it about forty times a step, and nn.Module.__setattr__ takes 10 us each time
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
        """Return True at the steps that loggers record and at the end of an epoch."""
        # because self.log at every step would take a large share of LeNet-300-100's step time
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

    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr, fused=self.fused or None)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self._optimizer()
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError(
                f"{type(self).__name__}'s learning rate depends on the length of the run: give the Trainer max_epochs or max_steps"
            )
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
    """Return the rate factor: half a cosine from 1 to 0 over the share ``restart`` of ``total`` steps, another over the rest, then 0."""
    turn = round(restart * total)
    begin, end = (0, turn) if step < turn or turn == total else (turn, total)
    return (1 + math.cos(math.pi * min((step - begin) / max(end - begin, 1), 1.0))) / 2


def sgd_or_adamw(
    parameters: Iterable[nn.Parameter], name: str, lr: float, momentum: float, weight_decay: float, fused: bool = False
) -> torch.optim.Optimizer:
    """Return SGD with Nesterov's momentum (plain without momentum), or AdamW, which has its own momentum, for the ``name`` "adamw"."""
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=fused or None)
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=momentum > 0, fused=fused or None)
