"""Nested optimisers and schedulers, and modules that do not step after every batch: each step counts once."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from lightning_sparse.conformance import toys
from lightning_sparse.conformance._lightning import Callback
from lightning_sparse.conformance._registry import Subject, check, require
from lightning_sparse.conformance.life_cycle import zeros
from lightning_sparse.conformance.steps import GROUP, Scheduled, own_steps, some_zeros


class SuperStep(torch.optim.Adam):
    """Adam with an overridden ``step`` that calls ``super().step()``."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Wrapper(torch.optim.Optimizer):
    """A wrapper around another optimiser, like Lookahead. It never calls ``Optimizer.__init__``."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.defaults = inner, inner.defaults
        self.param_groups, self.state = inner.param_groups, inner.state
        for hooks in ("step_pre", "step_post", "state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
            setattr(self, f"_optimizer_{hooks}_hooks", OrderedDict())

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


def super_step(parameters: Any) -> torch.optim.Optimizer:
    """Make :class:`SuperStep` after a plain Adam, because torch then calls the step hooks for both classes."""
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    return SuperStep(parameters, 1e-2)


def wrapped_step(parameters: Any) -> torch.optim.Optimizer:
    """Make :class:`Wrapper` around Adam."""
    return Wrapper(torch.optim.Adam(parameters, 1e-2))


def _end(subject: Subject, make: Any) -> dict[str, Tensor]:
    module = toys.Toy(optimizer=make)
    torch.manual_seed(0)
    subject.fit(module, epochs=4)
    return toys.weights(module)


@check("an optimiser that calls super().step() or wraps another optimiser ends like the plain one", GROUP)
def a_step_counts_once(subject: Subject, folder: Path) -> None:
    own_steps(subject)
    plain = _end(subject, lambda parameters: torch.optim.Adam(parameters, 1e-2))
    for name, make in {"super().step()": super_step, "a wrapped optimiser": wrapped_step}.items():
        for key, w in _end(subject, make).items():
            deviation = float((w - plain[key]).abs().max())
            where = f"from the plain run's with an optimiser that steps by {name}"
            require(deviation == 0, f"the final {key} differs by up to {deviation:.2g} {where}")


class EverySecond(toys.Toy):
    """A toy that steps after every second batch, on the sum of both batches' gradients."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        if batch_idx % 2 == 0:
            optimizer.zero_grad()


@check("a module whose optimizer_step steps every second batch ends about as sparse as with accumulate_grad_batches=2", GROUP)
def every_second_batch_steps(subject: Subject, folder: Path) -> None:
    options: Any = {"optimizer": subject.optimizer} if subject.optimizer else {}
    counts = []
    for module, accumulate in ((EverySecond(**options), 1), (toys.Toy(**options), 2)):
        torch.manual_seed(0)
        subject.fit(module, epochs=8, accumulate_grad_batches=accumulate)
        some_zeros(module, "where every second batch steps" if accumulate == 1 else "where two batches are accumulated")
        counts.append(zeros(module))
    require(counts[0] * 2 > counts[1], f"{counts[0]} weights are zero, {counts[1]} with accumulate_grad_batches=2")


class WarmUp(LRScheduler):
    """A linear warm-up followed by an inner scheduler, as in warm-up schedulers of other packages."""

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
        self.steps, self.after = steps, CosineAnnealingLR(optimizer, 12)
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        if self.last_epoch < self.steps:
            return [base * (self.last_epoch + 1) / self.steps for base in self.base_lrs]
        return self.after.get_last_lr()

    def step(self, epoch: Any = None) -> None:
        if self.last_epoch >= self.steps:
            self.after.step()
        super().step()


class _Rates(Callback):
    """Record the learning rate of every param group after each batch."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen.append([group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups])


@check("a scheduler that wraps another sees the module's own optimiser, and its learning rates apply", GROUP)
def a_scheduler_within_a_scheduler(subject: Subject, folder: Path) -> None:
    options: Any = {"optimizer": subject.optimizer} if subject.optimizer else {}
    module, rates = Scheduled(**options), _Rates()
    module.scheduler = WarmUp
    subject.fit(module, rates, epochs=4)
    some_zeros(module, "after a warm-up that hands over")
    plain, alone = Scheduled(**options), _Rates()
    plain.scheduler = WarmUp
    toys.trainer(alone, epochs=4).fit(plain, toys.data(), toys.data(seed=1))
    require(rates.seen == alone.seen, f"the learning rates of the optimiser's groups are {rates.seen}; without the callback {alone.seen}")
