"""Momentum, weight decay, accumulation, clipping and schedules: zeros stay zero, and lam keeps its meaning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.conformance import toys
from lightning_sparse.conformance._lightning import Callback
from lightning_sparse.conformance._registry import NotApplicable, Subject, check, require
from lightning_sparse.conformance.files import AtEveryHook
from lightning_sparse.conformance.life_cycle import SIZE, zeros

GROUP = "precision and steps"
Make = Callable[[Any], torch.optim.Optimizer]

MOMENTA: dict[str, Make] = {
    "SGD with momentum and decay": partial(torch.optim.SGD, lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "Adam with decay": partial(torch.optim.Adam, lr=1e-2, weight_decay=1e-2),
    "AdamW": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    "RMSprop with momentum": partial(torch.optim.RMSprop, lr=2e-4, momentum=0.9),
}


def own_steps(subject: Subject) -> None:
    if subject.optimizer:
        raise NotApplicable("the subject brings its own optimiser")


def some_zeros(module: nn.Module, where: str) -> None:
    """Check that some but not all weights are exactly zero, and that all are finite."""
    require(all(bool(torch.isfinite(p).all()) for p in module.parameters()), f"a weight is not finite {where}")
    require(0 < zeros(module) < SIZE, f"{zeros(module)} of {SIZE} weights are zero {where}; some but not all should be zero")


def matrices(module: nn.Module) -> dict[str, Tensor]:
    """Copy every weight matrix."""
    return {name: w for name, w in toys.weights(module).items() if w.dim() > 1}


# -- zeros stay ---------------------------------------------------------------------------------------------------------


class _Steps(Callback):
    """Record the zero masks of the weights at the end of each training batch and at the start of each validation."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Tensor]] = []
        self.epochs: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.batches.append({name: w == 0 for name, w in matrices(pl_module).items()})

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.epochs.append({name: w == 0 for name, w in matrices(pl_module).items()})


def _revived(states: list[dict[str, Tensor]]) -> int:
    """Count weights that are zero in the first state and non-zero in a later one."""
    return sum(int((state[name] & ~later[name]).sum()) for state in states[:1] for later in states[1:] for name in state)


@check("zeros of a frozen support stay zero under momentum, Adam and weight decay", GROUP)
def frozen_zeros_stay(subject: Subject, folder: Path) -> None:
    for name, make in MOMENTA.items() if subject.optimizer is None else [("its own optimiser", subject.optimizer)]:
        own, steps = [*subject.callbacks()], _Steps()
        freezing = [one for one in own if isinstance(getattr(one, "freeze", None), float)]
        for one in freezing:
            one.freeze = 0.5  # type: ignore[attr-defined]
        module = toys.Toy(optimizer=make)
        replace(subject, callbacks=partial(list, own)).fit(module, steps, epochs=6, num_sanity_val_steps=0)
        some_zeros(module, f"under {name}")
        late = steps.batches[13:] if freezing else steps.epochs[-2:]
        count = sum(int(zero.sum()) for zero in late[0].values())
        require(count > 0 or not freezing, f"no weight is zero {len(late)} batches before the end, with the support frozen under {name}")
        require(not (count := _revived(late)), f"{count} times a zero of the frozen support became non-zero under {name}")


def close(expected: dict[str, Tensor], actual: dict[str, Tensor], where: str) -> None:
    for name, w in expected.items():
        deviation = float((w - actual[name]).abs().max())
        require(deviation < 1e-3, f"{name} {where} differs by up to {deviation:.2g} from the plain run's")


# -- accumulation and clipping --------------------------------------------------------------------------------------------


class _Copies:
    """A loader that repeats each batch of the toy data ``times`` times."""

    def __init__(self, times: int) -> None:
        self.batches = [batch for batch in toys.data() for _ in range(times)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        return iter(self.batches)


def _accumulated(subject: Subject, times: int, seed: int = 0) -> dict[str, Tensor]:
    module = subject.model()
    torch.manual_seed(seed)
    trainer = subject.trainer(epochs=4, accumulate_grad_batches=times)
    trainer.fit(module, _Copies(times), toys.data(seed=1))
    some_zeros(module, f"with {times} batches per step")
    return toys.weights(module)


@check("lam has the same meaning with gradients accumulated over 1, 2 or 4 batches", GROUP)
def accumulation_keeps_lam(subject: Subject, folder: Path) -> None:
    once = _accumulated(subject, 1)
    others = {times: _accumulated(subject, times) for times in (2, 4)}
    if any(not torch.equal(w, once[name]) for name, w in _accumulated(subject, 1, seed=1).items()):
        return  # a random method draws more numbers for more batches, so only sparsity can be checked, as above
    for times, end in others.items():
        close(once, end, f"with each batch repeated {times} times and {times} batches per step")


class _Norms(Callback):
    """Record the largest gradient norm and the largest gradient over all optimiser steps."""

    norm, size = 0.0, 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(self._look)

    def _look(self, optimizer: torch.optim.Optimizer, *args: Any) -> None:
        self.gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Measure the gradients of the previous step, still present before automatic optimisation clears them."""
        gradients: list[Tensor] = getattr(self, "gradients", [])
        if gradients:
            self.norm = max(self.norm, float(torch.stack([g.norm() for g in gradients]).norm()))
            self.size = max(self.size, max(float(g.abs().max()) for g in gradients))


@check("gradient clipping by norm and by value limits the gradients that the optimiser uses", GROUP)
def clipping_holds(subject: Subject, folder: Path) -> None:
    for algorithm, limit in (("norm", 0.3), ("value", 0.2)):
        module, norms = subject.model(), _Norms()
        subject.fit(module, norms, epochs=4, gradient_clip_val=limit, gradient_clip_algorithm=algorithm)
        some_zeros(module, f"with gradients clipped by {algorithm}")
        largest = norms.norm if algorithm == "norm" else norms.size
        require(0 < largest < limit * 1.001, f"clipped by {algorithm} to {limit}, the largest of a step is {largest:.4g}")


# -- rates and closures -----------------------------------------------------------------------------------------------------


class Scheduled(toys.Toy):
    """A toy with a learning rate scheduler, stepped at every optimiser step."""

    scheduler: Callable[[torch.optim.Optimizer], Any]

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "to zero": partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 - step / 16),
    "with warm restarts": partial(torch.optim.lr_scheduler.CosineAnnealingWarmRestarts, T_0=4),
    "one cycle": partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=2e-2, total_steps=17),
}


@check("learning rate schedules (decay to zero, restarts, one cycle) end with exact zeros", GROUP)
def schedules_end_sparse(subject: Subject, folder: Path) -> None:
    for name, make in SCHEDULERS.items():
        own: Any = {"optimizer": subject.optimizer} if subject.optimizer else {}
        module = Scheduled(**own)
        module.scheduler = make
        subject.fit(module, epochs=4)
        some_zeros(module, f"after the schedule {name}")


@check("LBFGS is refused before it changes a weight, or ends with exact zeros", GROUP)
def lbfgs_is_refused_or_works(subject: Subject, folder: Path) -> None:
    own_steps(subject)
    module = toys.Toy(optimizer=partial(torch.optim.LBFGS, lr=0.1))
    before, steps = toys.weights(module), []
    watch = AtEveryHook(lambda moment, trainer, module: steps.append(moment) if moment == "on_train_batch_end" else None)
    try:
        subject.fit(module, watch)
    except Exception as error:
        changed = [name for name, w in toys.weights(module).items() if not torch.equal(w, before[name])]
        require(not steps and not changed, f"it failed after {len(steps)} batches, with {changed} changed: {error}")
        require("LBFGS" in str(error), f"the refusal does not name LBFGS: {error}")
    else:
        some_zeros(module, "under LBFGS")
