"""What is refused, with its reason, before training starts where it can be known before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_sparse import _checks, duality
from lightning_sparse.duality import MaskRule, Penalty
from lightning_sparse.schedules import Constant, Schedule

if TYPE_CHECKING:
    from lightning_sparse.callbacks._form import Form

_SHARDED = (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)


def check_penalty(given: Any, needs_separable: bool, form: str) -> Penalty:
    """The penalty of ``given``; TypeError for another type, ValueError where the duality or the form does not admit it."""
    if not isinstance(given, (Penalty, MaskRule)):
        raise TypeError(f"{form} takes a Penalty or a MaskRule, got {given!r}; for example penalties.LogSum(eps=2.0)")
    penalty = duality.to_penalty(given)
    if penalty.separable:
        duality.check_admissible(penalty)
    elif needs_separable or not isinstance(given, MaskRule):
        raise ValueError(f"{form} needs a separable penalty, {given!r} is not: its value at one weight depends on the others")
    return penalty


def strength(given: Penalty | MaskRule, lam: float | Schedule | None) -> float | Schedule:
    """``lam``, or a mask rule's own."""
    if lam is not None:
        return lam
    if isinstance(given, MaskRule):
        return given.lam
    raise ValueError(f"lam is required with a penalty: {given!r} knows no strength; for example lam=1e-3")


def check_patterns(select: Any) -> list[str] | None:
    """A list of strings, or None."""
    if select is None:
        return None
    if isinstance(select, str) or not isinstance(select, Sequence) or not all(isinstance(item, str) for item in select):
        raise TypeError(f"select must be a list of patterns such as ['*', '!head.*'], got {select!r}")
    return list(select)


def check_run(callback: Form, trainer: Trainer) -> None:
    """At setup: strategies that split parameters, two callbacks on the same weights, and forms that reach no zero."""
    if isinstance(trainer.strategy, _SHARDED):
        raise ValueError(
            f"{type(callback).__name__} does not support {type(trainer.strategy).__name__}, which splits the parameters; "
            "use a single device or DDPStrategy"
        )
    if callback.gap_samples and trainer.lightning_module is not None and not trainer.lightning_module.automatic_optimization:
        raise ValueError("gap_samples needs a training_step that returns its loss; manual optimisation has none: set gap_samples=0")
    _check_reachable(callback)


def _check_reachable(callback: Form) -> None:
    """A keep probability that starts at ``tol`` or above reaches no zero: ask for a magnitude threshold."""
    near = callback.penalty.eta_hat(torch.linspace(0, 1, 101, dtype=torch.float64))[0]
    alpha = float(duality.keep_probability(near, callback.schedule.lam))
    if callback.threshold is None and alpha >= callback.tol:
        raise ValueError(
            f"{callback.given!r} only shrinks: its keep probability is {alpha:.3g} at w = 0, never below tol={callback.tol:g}, so no "
            "weight would become zero; name a magnitude threshold, for example threshold=1e-2 (threshold=0 accepts that nothing is removed)"
        )


def check_optimizers(callback: Form, trainer: Trainer) -> None:
    """Before training: an optimiser that calls its closure several times, and selected weights that none updates."""
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                f"{type(callback).__name__} cannot work with LBFGS, which calls the closure several times a step; "
                "use a first-order optimiser"
            )
    updated = {name for optimizer in trainer.optimizers for name, *_ in callback._owned(optimizer)}
    missing = [name for name in callback.parameters if name not in updated]
    if missing:
        raise ValueError(
            f"no optimiser updates the selected {missing[:5]}; exclude them with select={['!' + name for name in missing[:5]]}"
        )


def check_overlap(callback: Form, trainer: Trainer) -> None:
    """Two sparsity callbacks on one weight."""
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        names = set(other.parameters) & set(callback.parameters) if hasattr(other, "schedule") and other is not callback else set()
        if names:
            raise ValueError(f"two sparsity callbacks select {sorted(names)[:5]}; give each its own with select=[...]")


def is_built_later(module: LightningModule) -> bool:
    """The module may still gain layers: it overrides setup or configure_model."""
    return is_overridden("setup", module) or is_overridden("configure_model", module)


def saves_on_exception(trainer: Trainer) -> bool:
    """Some callback writes a checkpoint when training fails."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return any(getattr(other, "save_on_exception", False) or isinstance(other, OnExceptionCheckpoint) for other in callbacks)


def fits(callback: Form, state: Any) -> bool:
    """``state`` is a Sparsifier's, of the same parameters."""
    return isinstance(state, dict) and "taken" in state and set(state["taken"]) == set(callback.parameters)


def check_closures(callback: Form, module: LightningModule, optimizer: torch.optim.Optimizer, count: int) -> None:
    """An optimiser that evaluated its closure again before stepping: the penalty and the masks are meant for one."""
    if count > 1 and module.automatic_optimization and len(module.trainer.optimizers) == 1:
        raise RuntimeError(
            f"{type(optimizer).__name__} evaluates the loss several times a step, which {type(callback).__name__} does not support; "
            "use an optimiser that calls its closure once"
        )


def total_steps(callback: Form, trainer: Trainer) -> float:
    """The run's optimiser steps (batches under manual optimisation); inf without an end, which shares cannot use."""
    total = float(trainer.estimated_stepping_batches)
    if total == trainer.max_steps:  # which counts the steps of all optimisers
        total = math.ceil(total / max(len(trainer.optimizers), 1))
    if not math.isfinite(total) and (callback.freeze or not isinstance(callback.schedule, Constant)):
        raise ValueError(
            f"freeze={callback.freeze:g} and {callback.schedule!r} need the length of the run: give the Trainer max_epochs or max_steps"
        )
    return total


def check_loss(callback: Form, loss: Tensor) -> None:
    """A loss that is not finite stops the run before its gradient reaches a weight."""
    if not bool(torch.isfinite(loss).all()):
        raise FloatingPointError(
            f"the loss is {float(loss.detach().sum())} at optimiser step {callback.step}; the weights are those before this batch. "
            "Check the data, lower the learning rate or lam, or clip gradients"
        )


def check_state(callback: Form, state: dict[str, Any]) -> None:
    """A checkpoint of another selection or model."""
    if set(state["taken"]) != set(callback.parameters):
        odd = sorted(set(state["taken"]) ^ set(callback.parameters))
        raise ValueError(
            f"the checkpoint's {type(callback).__name__} was written for other parameters; they differ in {odd[:5]}"
            f"{_checks.closest(odd[0], callback.parameters)}. Resume with the same model and selection"
        )
    for name, taken in state["taken"].items():
        zeros = int((callback.parameters[name] == 0).sum())
        if taken.numel() != zeros:
            raise ValueError(
                f"the checkpoint keeps {taken.numel()} thresholded weights of {name!r}, but the loaded file has {zeros} zeros there: "
                "its weights were changed after it was written"
            )
