"""One run: a problem, a callback, a seed."""

from __future__ import annotations

import logging
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from networks.problems import Problem


class Module(LightningModule):
    """A problem's network and loss under AdamW with one cycle of the rate, or SGD with momentum."""

    def __init__(self, problem: Problem, optimizer: str = "adamw", rate: float | None = None) -> None:
        super().__init__()
        self.problem, self.optimizer, self.rate = problem, optimizer, rate or problem.rate
        self.network = problem.network()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x)
        return out

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.problem.loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), self.rate, momentum=0.9)
        optimizer = torch.optim.AdamW(self.parameters(), self.rate, weight_decay=0.01)
        total = int(self.trainer.estimated_stepping_batches)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, self.rate, total_steps=total), "interval": "step"},
        }


def run(problem: Problem, callbacks: list[Callback], seed: int, epochs: int | None = None, **options: Any) -> dict[str, float]:
    """Train, and return on the validation part: loss, share of zeros of the selected weights, loss of a constant prediction."""
    started = time.perf_counter()
    seed_everything(seed, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    training, validation = problem.data()
    module = Module(problem, **options)
    loader = DataLoader(TensorDataset(*training), problem.batch, shuffle=True, drop_last=True)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(max_epochs=epochs or problem.epochs, accelerator="cpu", callbacks=callbacks, **quiet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader)
    module.eval()
    with torch.no_grad():
        out = module(validation[0])
        loss = float(problem.loss(out, validation[1]))
        error = float((out.argmax(1) != validation[1]).float().mean()) if not validation[1].is_floating_point() else loss
    zeros = float(trainer.callback_metrics.get("sparsity/total", 0.0))
    constant, seconds = problem.constant(validation[1]), time.perf_counter() - started
    return {"zeros": zeros, "loss": loss, "error": error, "constant": constant, "seconds": seconds}
