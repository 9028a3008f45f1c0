"""How long a run is, in the callback's own steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer

from lightning_sparse.callbacks._averages import extra_epochs
from lightning_sparse.callbacks.compatibility import is_a
from lightning_sparse.schedules import Constant

if TYPE_CHECKING:
    from lightning_sparse.callbacks._form import Form


def total_steps(callback: Form, trainer: Trainer) -> float:
    """The run's optimiser steps (batches under manual optimisation); inf where that is unknown, which shares cannot use."""
    total = _of_run(trainer, callback._drift)
    if total == trainer.max_steps:  # which counts the steps of all optimisers
        total = math.ceil(total / max(len(trainer.optimizers), 1))
    if not math.isfinite(total) and _trains(trainer) and (callback.freeze or not isinstance(callback.schedule, Constant)):
        needs = _needs_length(callback)
        why = "its training loader has no length" if trainer.max_epochs not in (None, -1) else "neither epochs nor steps are given"
        raise ValueError(
            f"{type(callback).__name__} with {needs} needs the length of the run, but {why}: "
            "give the Trainer max_steps, or limit_train_batches beside max_epochs"
        )
    return total


def _needs_length(callback: Form) -> str:
    """The arguments of a callback that are shares of the run, as they were given."""
    if callback.target_sparsity is not None:
        return f"target_sparsity={callback.target_sparsity:g}"
    schedule = "" if isinstance(callback.schedule, Constant) else repr(callback.schedule)
    return " and ".join(part for part in (f"freeze={callback.freeze:g}" if callback.freeze else "", schedule) if part)


def of_epochs(trainer: Trainer, drift: int = 0) -> float:
    """The optimiser steps (batches under manual optimisation) of all epochs, inf where their number or their length is unknown.

    All epochs are as long as the present one, but for ``drift`` in those before it. Lightning's own estimate knows neither a
    GradientAccumulationScheduler nor epochs that only renew batch norm.
    """
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if epochs is None or epochs == -1 or not math.isfinite(batches) or batches < 1:
        return math.inf
    return max(_steps_of(trainer, batches, max(epochs, 1) - extra_epochs(trainer)) + drift, 1)


def drift(trainer: Trainer, done: int) -> int:
    """At an epoch's start, ``done`` steps into the run: how many more the epochs before had than if they were as long as this one."""
    batches = trainer.num_training_batches
    return 0 if not math.isfinite(batches) else done - _steps_of(trainer, batches, trainer.current_epoch)


def _of_run(trainer: Trainer, drift: int) -> float:
    float(trainer.estimated_stepping_batches)  # loads the data, whose length is unknown before
    return min(of_epochs(trainer, drift), math.inf if trainer.max_steps == -1 else trainer.max_steps)


def _trains(trainer: Trainer) -> bool:
    """There are batches to train on."""
    return trainer.limit_train_batches != 0 and trainer.num_training_batches > 0


def _steps_of(trainer: Trainer, batches: float, epochs: int) -> int:
    """The optimiser steps of so many epochs of so many batches."""
    schedule = next((one for one in trainer.callbacks if is_a(one, "GradientAccumulationScheduler")), None)  # type: ignore[attr-defined]
    if schedule is None:
        return math.ceil(batches / trainer.accumulate_grad_batches) * epochs
    return sum(math.ceil(batches / schedule.get_accumulate_grad_batches(epoch)) for epoch in range(epochs))
