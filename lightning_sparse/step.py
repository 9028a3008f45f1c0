"""Follow the steps of an optimiser: count them, call hooks around them, and describe one, with the strengths that lam has in it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse.elementwise import Engine
from lightning_sparse.optimizer import ClipFactor, grad_scale, momentum_gain
from lightning_sparse.schedules import Constant, Schedule, TargetSparsity
from lightning_sparse.step_sizes import StepSizes, number
from lightning_sparse.weights import Member, WeightStore

Scale = Callable[[], float]


class Strength:
    """Stores the run's position in optimiser steps, and gives the lam in force there; ``least`` is a lower bound of lam.

    Args:
        schedule: the schedule of lam.
        target: the search for a target share of zeros, which then gives lam; None without a target.
    """

    def __init__(self, schedule: Schedule, target: TargetSparsity | None = None) -> None:
        self.schedule, self.target = schedule, target
        self.reset()

    def reset(self) -> None:
        """Reset before a new fit."""
        if self.target is not None:
            self.target.reset()
        self.step, self.total, self.least = 0, math.inf, 0.0
        self.factor = 1.0  # a method's factor on the schedule's lam, to limit it
        self.asked: float | None = None  # the target of a restored frozen support, if it differs from this run's

    @property
    def lam(self) -> float:
        """Return ``factor`` times the schedule's value (at least ``least``; before a fit the final one), or the target's lam."""
        if self.target is not None:
            return self.target.lam
        if not math.isfinite(self.total):
            return self.schedule.lam * self.factor
        lam = self.schedule.lam if isinstance(self.schedule, Constant) else self.schedule(self.step, self.total)
        return max(lam, self.least) * self.factor

    def share_asked(self, frozen: bool) -> float | None:
        """Return the share of zeros that the target asks for now, or asked for where the support is ``frozen``; None without a target."""
        if self.target is None:
            return None
        return self.target.asked if not frozen else self.target.target if self.asked is None else self.asked

    def frozen_share(self, freeze: float) -> float:
        """Return the last share of the run whose support is frozen: ``freeze``, or, where that is 0, the default with a target."""
        return freeze or (0.0 if self.target is None else self.target.fine_tuned)

    @property
    def is_constant(self) -> bool:
        """Return True if lam is one number throughout."""
        return self.target is None and isinstance(self.schedule, Constant)


class ShareOfZeros(Strength):
    """Gives a share of zeros in the place of lam, which is also what ``sparsity/lam`` logs: the one asked for at the run's position."""

    def share_asked(self, frozen: bool) -> float:
        return self.lam if not frozen else self.schedule.lam if self.asked is None else self.asked


@dataclass
class Step:
    """Describes one step of an optimiser, and the strengths that lam has in it.

    ======================  ==========================================  ======================================
    strength                lam multiplied by                           used by
    ======================  ==========================================  ======================================
    ``lam_on_gradient``     AMP scale, -1 where the group maximises     gradient terms: penalty, loss, eta-trick,
                                                                        learned noise, what bounded masks fall short of
    ``lam_on_prox``         the step's clip factor, momentum gain       proximal steps
    ``lam``                 the mean clip factor (the caller's; the     the zero test: ``Method.is_at_rest``
                            zero region also uses the momentum's
                            memory)
    ``lam``                 1; calibrated by the curvature              the noise of masks
    ======================  ==========================================  ======================================

    Args:
        optimizer: the optimiser that steps.
        members: (name, parameter, param group) of each selected parameter that it updates.
        lam: the strength in force.
        engine: runs functions over many tensors.
        live: returns the live weights of a parameter by name; by default its data.
        sizes: step sizes of the optimiser.
        grad_scale: the scale that a fused optimiser's gradients still have; 1 for others.
        loss_scale: returns the GradScaler's factor on the loss (the call waits for an accelerator); 1 without one.
        clip_factor: the factor by which clipping multiplied this step's gradients.
    """

    optimizer: Optimizer
    members: list[Member]
    lam: float
    engine: Engine
    live: Callable[[str], Tensor] | None = None
    sizes: StepSizes = field(default_factory=StepSizes)
    grad_scale: float = 1.0
    loss_scale: Scale = lambda: 1.0
    clip_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.live is None:
            parameters = {name: parameter for name, parameter, _ in self.members}
            self.live = lambda name: parameters[name].detach()

    def trained(self) -> Iterable[Member]:
        """Yield the members that have a gradient."""
        return (member for member in self.members if member[1].grad is not None)

    def lam_on_gradient(self, group: dict[str, Any]) -> float:
        """Return lam for a term that is added to gradients of a param group."""
        return self.lam * self.grad_scale * (-1 if group.get("maximize") else 1)

    def lam_on_prox(self, group: dict[str, Any]) -> float:
        """Return lam for a proximal step after the optimiser's, on a param group."""
        return momentum_gain(group) * (self.lam * self.clip_factor)


class Steps:
    """Describes the steps of a run.

    Args:
        weights: the selected weights.
        strength: lam in force.
        engine: runs functions over many tensors.
        sizes: step sizes of the optimisers.
        clipping: measures how clipping changes the gradients.
    """

    def __init__(self, weights: WeightStore, strength: Strength, engine: Engine, sizes: StepSizes, clipping: ClipFactor) -> None:
        self.weights, self.strength, self.engine, self.sizes, self.clipping = weights, strength, engine, sizes, clipping
        self.scaler: Any | None = None  # the enabled GradScaler, which skips steps whose gradients are not finite

    def of(self, optimizer: Optimizer) -> Step:
        """Describe the step that ``optimizer`` takes now, or has just taken."""
        given = optimizer, self.weights.members(optimizer), self.strength.lam, self.engine, self.weights.live, self.sizes
        if self.scaler is None:
            return Step(*given, clip_factor=self.clipping.last)
        return Step(*given, grad_scale(self.scaler, optimizer), self.scaler.get_scale, self.clipping.last)

    def loss_scale(self, batches: int) -> float:
        """Return the factor on the loss in backward: the fp16 scale divided by the number of accumulated ``batches``."""
        return (1.0 if self.scaler is None else float(self.scaler.get_scale())) / batches


def uniform_rate(optimizer: Optimizer, group: Mapping[str, Any]) -> float:
    """Return the step per unit of gradient in the long run if it is one number, as with SGD; else 0."""
    if not isinstance(optimizer, (torch.optim.SGD, torch.optim.ASGD)):
        return 0.0
    return number(group.get("lr"), 0.0) * momentum_gain(group)


@torch.no_grad()
def bound_uniform_steps(
    optimizer: Optimizer, members: Iterable[tuple[str, Tensor, dict[str, Any]]], longest: float, grad_scale: float = 1.0
) -> None:
    """Bound the gradients of parameters that move by lr times their gradient, so that a step is at most ``longest / sqrt(inputs)``.

    Gradients are ``grad_scale`` times those of the loss. Parameters under other rules stay as they are.
    """
    for _, parameter, group in members:
        if parameter.numel() and uniform_rate(optimizer, group) > 0 and float(group["lr"]) > 0:
            farthest = longest * parameter[0].numel() ** -0.5 * grad_scale / float(group["lr"])
            parameter.grad.clamp_(-farthest, farthest)  # type: ignore[union-attr]


# -- counting ----------------------------------------------------------------------------------------------------------------


class Clock:
    """Counts the same steps as Lightning's Trainer, however often an optimiser steps or evaluates its loss within one.

    Lightning counts one optimiser step a batch in automatic optimisation (none while it accumulates), also where a module's
    ``optimizer_step`` skips it or steps several times. For each batch the clock records which optimisers had their gradients prepared,
    how often each evaluated its loss, and whether the batch's step was counted. The count and the run's length are stored in the
    strength.
    """

    def __init__(self, strength: Strength) -> None:
        self.strength = strength
        self.begun = False  # training has started
        self.idle: int | None = None  # batches of this fit before the first optimiser step; None once there was one
        self.offset, self.whole = 0, math.inf  # steps before this callback's first, and those of the whole run
        self.drift = 0  # steps that earlier epochs had beyond those of epochs as long as this one
        self.begin_batch(0)

    # -- the run -----------------------------------------------------------------------------------------------------------

    def begin_at(self, offset: int) -> None:
        """Set the callback's first step to ``offset`` steps into the run."""
        self.offset, self.strength.total = offset, max(self.whole - offset, 1)

    def measure(self, whole: float) -> None:
        """Set the number of steps of the whole run."""
        self.whole = whole
        self.begin_at(self.offset)

    def begin(self, done: int) -> bool:
        """Start training after ``done`` steps of the run, which leave this callback fewer; return True the first time."""
        if not self.begun:
            self.begin_at(done)
        begun, self.begun = self.begun, True
        self.idle = 0
        return not begun

    def begin_epoch(self, drift: int) -> bool:
        """Start an epoch; return True if the loader was rebuilt with another length."""
        changed, self.drift = drift != self.drift, drift
        return changed

    # -- a batch -----------------------------------------------------------------------------------------------------------

    def begin_batch(self, steps: int) -> None:
        """Start a batch; Lightning has counted ``steps`` optimiser steps before it."""
        self.counted = False  # this batch's step is counted
        self.steps_before = steps
        self._prepared: set[int] = set()  # optimisers whose gradients were prepared and that have not stepped since
        self._evaluations: dict[int, int] = {}  # of the loss within an optimiser's step, by the optimiser's id

    def begin_step(self, optimizer: Any) -> None:
        """Start an optimiser's step."""
        self._evaluations[id(optimizer)] = 0

    def prepare(self, optimizer: Any) -> int:
        """Note that an optimiser's gradients are about to be changed; return how often its loss was evaluated in this step."""
        self._prepared.add(id(optimizer))
        if id(optimizer) not in self._evaluations:  # because under a GradScaler the loss is evaluated before the step begins
            return 1
        self._evaluations[id(optimizer)] += 1
        return self._evaluations[id(optimizer)]

    def is_prepared(self, optimizer: Any) -> bool:
        """Return True if an optimiser's gradients were prepared in this batch since it last stepped."""
        return id(optimizer) in self._prepared

    def end_step(self, optimizer: Any, stepped: bool = True) -> None:
        """End an optimiser's step; ``stepped`` is False if it was skipped."""
        self._evaluations.pop(id(optimizer), None)
        if stepped:
            self._prepared.discard(id(optimizer))

    def end_batch(self) -> None:
        """End a batch."""
        self.idle = None if self.idle is None else self.idle + 1

    def count(self) -> None:
        """Count this batch's step."""
        self.strength.step, self.counted = self.strength.step + 1, True

    def missing(self, steps: int) -> int:
        """Return how many of the batch's steps were not counted yet at its end, after ``steps`` of automatic optimisation in all."""
        # a step without a call of the optimiser; not one that a GradScaler skipped
        return int(steps > self.steps_before and not self.counted and not self._prepared)


def is_idle(optimizer: Any) -> bool:
    """Return True at learning rate 0: torch's checkpointing steps an optimiser without state under FSDP2, to create its state."""
    return all(float(group.get("lr", 1.0)) == 0 for group in optimizer.param_groups)


def is_skipped(optimizer: Any) -> bool:
    """Return True if the GradScaler skips this step: a fused optimiser is still called, with ``found_inf`` set."""
    return float(getattr(optimizer, "found_inf", None) or 0) > 0


# -- calls around an optimiser's steps -------------------------------------------------------------------------------------
# torch's own step hooks are not used, because they belong to a class's step: if a subclass calls super().step() they run once for each
# class in between that was ever instantiated, and not at all for a wrapper that never calls Optimizer.__init__.

Hook = Callable[[Any], None]  # takes the optimiser


class _Hooks(NamedTuple):
    before: Hook | None
    after: Hook | None


class Handle:
    """Removes the hooks of one :func:`around` call, and with the last ones the method that called them."""

    def __init__(self, optimizer: Any, method: str, hooks: dict[int, _Hooks]) -> None:
        self._optimizer, self._method, self._hooks, self._key = optimizer, method, hooks, id(self)

    def remove(self) -> None:
        """Remove the hooks; a second call does nothing."""
        self._hooks.pop(self._key, None)
        own = vars(self._optimizer).get(self._method)
        if self._hooks or not isinstance(own, MethodType) or getattr(own.__func__, "_sparse_hooks", None) is not self._hooks:
            return  # other hooks need the method, or something else has wrapped it since
        if own.__func__._sparse_own is None:  # type: ignore[attr-defined]
            delattr(self._optimizer, self._method)
        else:
            setattr(self._optimizer, self._method, own.__func__._sparse_own)  # type: ignore[attr-defined]


def around(optimizer: Any, before: Hook | None = None, after: Hook | None = None, method: str = "step") -> Handle:
    """Call ``before(optimizer)`` when a step of ``optimizer`` begins and ``after(optimizer)`` when it has ended.

    Steps within a step (``super().step()``, an optimiser that it holds) do not call the hooks again. ``after`` is not called if the
    step raises. ``method`` names another method to call the hooks around.
    """
    hooks: dict[int, _Hooks] | None = getattr(getattr(optimizer, method), "_sparse_hooks", None)
    if hooks is None:
        hooks = {}
        setattr(optimizer, method, MethodType(_watched(optimizer, method, hooks), optimizer))
    handle = Handle(optimizer, method, hooks)
    hooks[id(handle)] = _Hooks(before, after)
    return handle


def _watched(optimizer: Any, method: str, hooks: dict[int, _Hooks]) -> Callable[..., Any]:
    """Return a method for ``optimizer`` that calls ``hooks`` around the one it has."""
    own, inside = vars(optimizer).get(method), False  # ``own`` is set on this object, as by a scheduler
    given = getattr(optimizer, method)

    @functools.wraps(getattr(given, "__func__", given))  # because GradScaler reads a step's signature, and schedulers its attributes
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        call = functools.partial(getattr(type(self), method), self) if own is None else own
        if inside or self is not optimizer:  # because a copy of the optimiser has a copy of this method
            return call(*args, **kwargs)
        called = [*hooks.values()]
        for one in called:
            if one.before is not None:
                one.before(self)
        inside = True
        try:
            result = call(*args, **kwargs)
        finally:
            inside = False
        for one in called:
            if one.after is not None:
                one.after(self)
        return result

    watched._sparse_hooks, watched._sparse_own = hooks, own  # type: ignore[attr-defined]
    return watched
