"""A network with given gradients, so that the additional time of a step is the callback's."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from lightning_sparse.conformance import toys

WARM_UP = 2  # first steps of each fit, which allocate, are not counted


class Filled(LightningModule):
    """About ``weights`` weights in ``tensors`` nearly square matrices of one shape; ``count`` is their exact number.

    The forward uses none of them and the backward hands each a gradient of its own memory, through autograd, so that hooks
    on gradients run. The optimiser leaves everything as it is.
    """

    def __init__(self, weights: int, tensors: int = 1) -> None:
        super().__init__()
        rows = max(1, math.isqrt(weights // tensors))
        columns = max(1, weights // tensors // rows)
        self.layers = nn.ModuleList(nn.Linear(columns, rows, bias=False) for _ in range(tensors))
        self.count = rows * columns * tensors

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss: Tensor = _ByHand.apply(*self.parameters())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Still(self.parameters())


class _ByHand(torch.autograd.Function):
    """Return 0 in the forward and 1e-3 as every gradient."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> Tensor:
        ctx.shapes = [weight.shape for weight in weights]
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.full(shape, 1e-3) for shape in ctx.shapes)


class Still(torch.optim.Optimizer):
    """An optimiser with learning rate 0.01 whose steps change nothing."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        return closure() if closure else None


class Over(Exception):
    """Raised to end the fit without the work at the end of an epoch."""


class Asked:
    """A loader of ``steps`` batches that calls ``look`` before each batch, and ends the fit after the last."""

    def __init__(self, steps: int, look: Callable[[], None], batch: Any = None) -> None:
        self.steps, self.look, self.batch = steps, look, torch.zeros(1) if batch is None else batch

    def __len__(self) -> int:
        return self.steps + 1

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.steps):
            self.look()
            yield self.batch
        self.look()
        raise Over


def fit(module: LightningModule, callbacks: Sequence[Callback], loader: Asked) -> None:
    """Fit in a quiet Trainer until the loader ends it."""
    with suppress(Over):
        toys.trainer(*callbacks, epochs=1).fit(module, loader)


def seconds(module: LightningModule, callbacks: Sequence[Callback], steps: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Measure the median duration of ``steps`` training steps with ``callbacks``, from one batch to the next."""
    times: list[float] = []
    fit(module, callbacks, Asked(steps + WARM_UP, lambda: times.append(clock())))
    taken = [after - before for before, after in itertools.pairwise(times)]
    return statistics.median(taken[WARM_UP:])
