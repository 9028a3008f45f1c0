"""Runs that end early, and runs that go on: what was promised and not reached, and what applies to added steps."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_sparse import elementwise
from lightning_sparse.schedules import Constant

if TYPE_CHECKING:
    from lightning_sparse.callbacks._supported import Supported


def close(callback: Supported, trainer: Trainer) -> None:
    """When training ends: cut to the target where that was asked for, else warn, once, of what the run did not reach.

    A schedule that steps skipped by a GradScaler have left behind is no reason to warn: only one that was cut short is.
    """
    missed = callback.unreached() if callback.parameters and callback.step < callback.total else []
    missed += _schedule_left(callback) if trainer.should_stop and callback.parameters else []
    if not missed:
        return
    said = f"training ended at step {callback.step} of {callback.total:g}, before {type(callback).__name__} was done: {'; '.join(missed)}"
    target, due = callback.target_sparsity, math.ceil(callback.total * callback.planned_end)
    if target is not None and callback.finish == "prune":
        freeze(callback)
        rank_zero_info(f"{said}. finish='prune' has removed the lowest ranks, so that {callback.share_of_zeros():.2%} are zero")
        return
    later = f"Train to step {due} at least (later EarlyStopping, longer max_time), or give the Trainer a smaller max_epochs or max_steps"
    rank_zero_warn(f"{said}. {later}" + ("" if target is None else "; finish='prune' cuts to the target wherever training ends"))


def freeze(callback: Supported) -> None:
    """Freeze the support at the target, now."""
    callback.support = {}
    callback._freeze(callback.parameters)


def unreached(callback: Supported) -> list[str]:
    """What a callback promised and has not reached by now, a phrase each."""
    found = []
    if not callback.frozen and callback.target_sparsity is not None:
        found.append(f"{callback.share_of_zeros():.2%} of the selected weights are zero, target_sparsity is {callback.target_sparsity:g}")
    elif not callback.frozen and callback.freeze:
        at = round(callback.total * (1 - callback.freeze))
        found.append(f"its support was to be frozen at step {at} (freeze={callback.freeze:g}), so nothing was fine-tuned")
    return found


def _schedule_left(callback: Supported) -> list[str]:
    """How far lam is from the end of its schedule; empty where it is there, and for pruning, whose schedule is its ramp."""
    lam, end = callback.lam, callback.schedule.lam
    if callback.frozen or callback.target_sparsity is not None or isinstance(callback.schedule, Constant) or lam >= end * (1 - 1e-6):
        return []
    return [f"lam has come to {lam:.3g}, its schedule ends at {end:g}"]


def say_length(callback: Supported, planned: float | None) -> None:
    """Say what applies to a run that goes on for another number of steps than was planned when its state was written."""
    if planned is None or planned == callback.total or not math.isfinite(callback.total):
        return
    name, length = type(callback).__name__, f"for {callback.total:g} optimiser steps in all, not {planned:g}"
    if callback.frozen:
        rank_zero_warn(
            f"{name} goes on {length}, and its support is frozen already: the steps from {callback.step} on fine-tune the same "
            f"{1 - callback.share_of_zeros():.2%} of the weights, without penalty or noise. To choose the zeros anew, load the weights "
            "into the module and fit it by a new Trainer without ckpt_path"
        )
    elif callback.freeze or callback.ascent is not None or not isinstance(callback.schedule, Constant):
        rank_zero_info(f"{name} goes on {length}: its shares (freeze, warm-up, ramp) are of the new length; weights held at zero stay so")


class Fit:
    """The Trainer and the module of a callback's last fit, by which a second fit is known to go on from it.

    A copy or a pickle of it knows neither.
    """

    def __init__(self, trainer: Trainer | None = None, module: LightningModule | None = None) -> None:
        self._known = tuple(weakref.ref(one) for one in (trainer, module) if one is not None)

    def goes_on(self, trainer: Trainer, module: LightningModule) -> bool:
        """The same Trainer, which has trained before, fits the same module again."""
        known = [one() for one in self._known]
        return len(known) == 2 and known[0] is trainer and known[1] is module and trainer.fit_loop.total_batch_idx >= 0

    def __reduce__(self) -> tuple[type[Fit], tuple[()]]:
        return Fit, ()


@torch.no_grad()
def carried(callback: Supported) -> dict[str, Any] | None:
    """The state by which a second fit of the same Trainer goes on.

    The module's weights stay as they are, and the optimiser is a new one: of that nothing is carried. None where the first fit has
    taken no step, or where weights that it held at zero have been given other values since: then they are meant to be trained anew.
    """
    masks = [*callback.held.items(), *callback.cut.items(), *(callback.support or {}).items()]
    pruned = (elementwise.local_part(callback.parameters[name].detach())[~elementwise.local_part(where)] for name, where in masks)
    changed = any(bool((values != 0).any()) for values in pruned)
    if not callback.step or not callback._begun or changed:
        return None
    state = callback.state_dict()
    state.pop("averaged", None)
    state.pop("moments", None)
    live = {name: elementwise.full_tensor(parameter.detach()) for name, parameter in callback.parameters.items()}
    return state | {"taken": {name: w[w == 0].cpu() for name, w in live.items()}}
