"""Measure the run's length, and choose the parameters, also those that become trainable later."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import move_data_to_device, rank_zero_info
from torch import Tensor
from torch.nn import Parameter

from lightning_sparse import _roles
from lightning_sparse.callbacks.compatibility import those_of
from lightning_sparse.callbacks.options import Options
from lightning_sparse.callbacks.weight_averaging import extra_epochs
from lightning_sparse.schedules import FINE_TUNED, FINE_TUNED_AGAIN, Constant, TargetSparsity
from lightning_sparse.select import select
from lightning_sparse.step import Clock, Strength
from lightning_sparse.weights import WeightStore

# -- length ----------------------------------------------------------------------------------------------------------------


def batches_of(trainer: Trainer) -> int:
    """Return the number of batches trained on."""
    return int(trainer.fit_loop.epoch_loop.total_batch_idx) + 1


def steps_done(trainer: Trainer, manual: bool) -> int:
    """Return the optimiser steps so far, as the clock counts them: batches under manual optimisation."""
    return batches_of(trainer) if manual else trainer.global_step


def missing_batches(trainer: Trainer, clock: Clock) -> int:
    """Return, at a batch's end under manual optimisation, the number of steps that the clock has not counted yet."""
    batches, ends = batches_of(trainer), (clock.whole, of_epochs(trainer, clock.drift), trainer.max_steps)
    return _reached(trainer.global_step, batches, *ends) - _reached(clock.steps_before, batches - 1, *ends)


def _reached(steps: int, batches: int, total: float, epochs: float, most: int) -> int:
    """Return, under manual optimisation, the part of ``total`` reached after ``batches`` or ``steps``, whichever is more."""
    if total == float("inf"):
        return batches
    by_batches = 0 if epochs == float("inf") else batches * int(total) // int(epochs)
    return max(by_batches, 0 if most == -1 else steps * int(total) // most)


def batches_of_epoch(trainer: Trainer, steps: float) -> float:
    """Return the batches of an epoch, or of a run of ``steps`` if its loader has no length; inf if both are unknown."""
    batches = float(trainer.num_training_batches)
    return batches if math.isfinite(batches) else steps * trainer.accumulate_grad_batches


def total_steps(trainer: Trainer, drift: int, options: Options, strength: Strength) -> float:
    """Return the run's optimiser steps (batches under manual optimisation); inf if unknown and not needed.

    Call it once training starts, because before that the Trainer would forget a stateful loader's position in its epoch.
    """
    float(trainer.estimated_stepping_batches)  # because this loads the data, whose length is unknown before
    total = min(of_epochs(trainer, drift), math.inf if trainer.max_steps == -1 else trainer.max_steps)
    if total == trainer.max_steps:  # because max_steps counts the steps of all optimisers
        total = math.ceil(total / max(len(trainer.optimizers), 1))
    trains = trainer.limit_train_batches != 0 and trainer.num_training_batches > 0
    if not math.isfinite(total) and trains and (strength.frozen_share(options.freeze) or not isinstance(strength.schedule, Constant)):
        has_epochs, has_length = trainer.max_epochs not in (None, -1), math.isfinite(trainer.num_training_batches)
        why = "its training loader has no length" if has_epochs else "neither epochs nor steps are given"
        ways = "max_epochs, such as max_epochs=20, or max_steps" if has_length else "max_steps, or limit_train_batches and max_epochs >= 1"
        raise ValueError(
            f"{options.form} with {_shares(options, strength)} needs the length of the run, but {why}: give the Trainer {ways}"
        )
    return total


class LoaderDraws:
    """Repeats, when training starts, what the training loader drew from torch's generator while a sanity check ran.

    Lightning sets the generator back after the check. Without this, the run would have other random numbers than one without this
    package, and a resumed run others than one that went on.
    """

    def __init__(self) -> None:
        self._states: tuple[Tensor, Tensor] | None = None

    def record(self, load: Callable[[], None]) -> None:
        """Call ``load`` and keep the generator's states before and after it."""
        before = torch.get_rng_state()
        load()
        self._states = before, torch.get_rng_state()

    def repeat(self) -> None:
        """Set the state after the loading, if the generator is in the state before it."""
        if self._states is not None and torch.equal(torch.get_rng_state(), self._states[0]):
            torch.set_rng_state(self._states[1])
        self._states = None


def _shares(options: Options, strength: Strength) -> str:
    """Describe the arguments that are shares of the run, as they were given."""
    if options.target_sparsity is not None:
        return f"target_sparsity={options.target_sparsity:g}"
    schedule = "" if isinstance(strength.schedule, Constant) else repr(strength.schedule)
    return " and ".join(part for part in (f"freeze={options.freeze:g}" if options.freeze else "", schedule) if part)


def begin_search(options: Options, target: TargetSparsity, zeros: float, module: LightningModule) -> None:
    """Record the share of ``zeros`` at the start; end the ramp to the target earlier, and log it, for a network that was trained before.

    A given ``freeze`` is kept.
    """
    target.began = zeros
    if not options.freeze and _roles.is_trained(module):
        target.fine_tuned = FINE_TUNED_AGAIN
        if zeros >= target.target:  # there is nothing left to ramp to
            return
        rank_zero_info(
            f"{options.form}: the network was trained before (the biases of a norm are not all equal), so the ramp to target_sparsity="
            f"{target.target:g} takes the first {1 - FINE_TUNED_AGAIN:.0%} of the run and the rest fine-tunes. freeze={FINE_TUNED:g} gives "
            f"{1 - FINE_TUNED:.0%} to the ramp"
        )


def of_epochs(trainer: Trainer, drift: int = 0) -> float:
    """Return the optimiser steps (batches under manual optimisation) of all epochs; inf if their number or length is unknown.

    Assume that all epochs are as long as the present one, except for ``drift`` in those before it. Lightning's own estimate ignores a
    GradientAccumulationScheduler and epochs that only update batch norm.
    """
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if epochs is None or epochs == -1 or not math.isfinite(batches) or batches < 1:
        return math.inf
    return max(_steps_of(trainer, batches, max(epochs, 1) - extra_epochs(trainer)) + drift, 1)


def drift_of(trainer: Trainer, done: int) -> int:
    """Return, at an epoch's start, ``done`` minus the steps that the earlier epochs would have had at this epoch's length."""
    batches = trainer.num_training_batches
    return 0 if not math.isfinite(batches) else done - _steps_of(trainer, batches, trainer.current_epoch)


def _steps_of(trainer: Trainer, batches: float, epochs: int) -> int:
    """Return the optimiser steps of this many epochs of this many batches."""
    schedules = those_of(trainer, "GradientAccumulationScheduler")
    if not schedules:
        return math.ceil(batches / trainer.accumulate_grad_batches) * epochs
    return sum(math.ceil(batches / schedules[0].get_accumulate_grad_batches(epoch)) for epoch in range(epochs))


# -- parameters ------------------------------------------------------------------------------------------------------------


def choose(patterns: list[str] | None, trainer: Trainer, module: LightningModule, state: Any = None) -> dict[str, Parameter]:
    """Return the selected parameters at the start of a fit.

    With a finetuning callback, matching parameters that are frozen may become trainable later; without one they are refused, see
    :func:`lightning_sparse.select.select`. A run that is resumed from ``state`` starts with the parameters of that state.
    """
    chosen = select(module, patterns, trainable=not unfreezes(trainer))
    now = {name: parameter for name, parameter in chosen.items() if parameter.requires_grad}
    before = saved_values(state)
    known = now if before.keys() <= now.keys() else select(module, patterns, trainable=False)
    return {name: known[name] for name in before if name in known} | now  # in the order in which they became trainable


def unfreezes(trainer: Trainer) -> bool:
    """Return True if a finetuning callback may make more parameters trainable during the run."""
    return bool(those_of(trainer, "BaseFinetuning"))


def saved_values(state: Any) -> dict[str, Any]:
    """Return what a sparsity callback's state keeps of each parameter; empty for other states."""
    taken = state.get("taken") if isinstance(state, dict) else None
    return taken if isinstance(taken, dict) else {}


def fits(patterns: list[str] | None, trainer: Trainer, module: LightningModule, state: Any) -> bool:
    """Return True if ``state`` is a sparsity callback's state for the same parameters."""
    return bool(saved_values(state)) and set(saved_values(state)) == set(choose(patterns, trainer, module, state))


def newly_trainable(weights: WeightStore, patterns: list[str] | None, trainer: Trainer, module: LightningModule) -> dict[str, Parameter]:
    """Return the parameters that match the selection and that an optimiser has started to update."""
    updated = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    updated -= {id(parameter) for parameter in weights.parameters.values()}
    found = select(module, patterns, trainable=False)
    return {name: parameter for name, parameter in found.items() if parameter.requires_grad and id(parameter) in updated}


def example_inputs(trainer: Trainer, module: LightningModule) -> Any:
    """Return inputs of the module's forward: its ``example_input_array``, else those of the first training batch.

    The loader is asked for one batch, with the random state restored afterwards. Of a dict, entries that forward does not take, such as
    labels, are left out.
    """
    given = module.example_input_array
    if given is None:
        with torch.random.fork_rng(devices=[]):
            batch = next(iter(trainer.fit_loop._data_source.dataloader()))
        given = batch[0] if isinstance(batch, (list, tuple)) else batch
        if isinstance(given, Mapping):
            takes = inspect.signature(module.forward).parameters
            every = any(one.kind is one.VAR_KEYWORD for one in takes.values())
            given = {key: value for key, value in given.items() if every or key in takes}
    return move_data_to_device(given, module.device)
