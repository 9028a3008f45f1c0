"""Time of a fit after its last step (figures, logging, final thresholding), and time of a step."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_sparse.conformance import toys
from performance import hooks

WIDTH, BATCH, WARM_UP = 70, 128, 3
END = ("on_train_epoch_end", "on_train_end", "on_fit_end")


class Wide(LightningModule):
    """``tensors`` parallel Linear layers of WIDTH x WIDTH, with one batch and fused Adam."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(tensors))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss: Tensor = torch.stack([layer(batch).square().mean() for layer in self.layers]).mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-4, fused=True)


class Ends(Callback):
    """Record the end time of each step."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.times = clock, list[float]()

    def on_train_batch_end(self, *_: Any) -> None:
        self.times.append(self.clock())

    @property
    def step(self) -> float:
        """Median seconds per step, without the first steps, which allocate."""
        return statistics.median(after - before for before, after in itertools.pairwise(self.times[WARM_UP - 1 :]))


def after_the_last_step(
    module: LightningModule, callbacks: Sequence[Callback], steps: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Return seconds of a ``step``, of the ``tail`` until ``fit`` returns, and of the callbacks' hooks in END."""
    ends, spent = Ends(clock), [hooks.timed(callback, clock) for callback in callbacks]
    loader = toys.Repeated(torch.randn(BATCH, WIDTH), WARM_UP + steps)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        trainer = toys.trainer(*callbacks, ends, epochs=1, logger=CSVLogger(folder))
        trainer.fit(module, loader)
        tail = clock() - ends.times[-1]
    return {"step": ends.step, "tail": tail} | {name: sum(one[name] for one in spent) for name in END}
