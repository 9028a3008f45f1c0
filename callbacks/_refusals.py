"""What is refused, with its reason, before training starts where it can be known before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_sparse import _checks, duality, elementwise
from lightning_sparse.callbacks.compatibility import SparsityCallback, is_a, overrides
from lightning_sparse.duality import MaskRule, Penalty
from lightning_sparse.select import left_out

if TYPE_CHECKING:
    from lightning_sparse.callbacks._arguments import Arguments
    from lightning_sparse.callbacks._form import Form


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


def check_dual(penalty: Penalty, form: str) -> None:
    """A penalty whose eta cannot be found by descent: its dual is infinite, or flat, so that eta would grow for ever."""
    eta = torch.logspace(-4, 4, 65, dtype=torch.float64)
    value, slope = penalty.dual(eta), penalty.dual_slope(eta)
    if bool(torch.isfinite(value).all()) and bool((slope > 0).any()):
        return
    why = "is flat" if bool(torch.isfinite(value).all()) else f"is infinite from eta = {float(eta[~torch.isfinite(value)][0]):.3g} on"
    raise ValueError(f"{form} learns eta by descent on the dual f, but f of {penalty!r} {why}; use ReweightedPenalty or AdaptiveProx")


def check_compile(given: object, form: Arguments) -> bool:
    """True or False; ValueError where there is nothing to compile."""
    if _checks.truth("compile", given) and not form.compiles:
        raise ValueError(f"{type(form).__name__} has no kernel to compile; leave compile=True out, or use ReweightedPenalty")
    if given and not form.penalty.separable:
        raise ValueError(f"compile=True needs a penalty that works weight by weight, {form.given!r} does not; leave compile=True out")
    return bool(given)


def check_patterns(select: Any) -> list[str] | None:
    """A list of strings, or None."""
    if select is None:
        return None
    if isinstance(select, str) or not isinstance(select, Sequence) or not all(isinstance(item, str) for item in select):
        raise TypeError(f"select must be a list of patterns such as ['*', '!head.*'], got {select!r}")
    if not select:
        raise ValueError("select=[] selects nothing; leave it out, or None, for every weight matrix")
    return list(select)


def check_run(callback: Form, trainer: Trainer) -> None:
    """At setup: strategies that split parameters, two callbacks on the same weights, and forms that reach no zero."""
    _check_strategy(callback, trainer.strategy)
    if callback.gap_samples and trainer.lightning_module is not None and not trainer.lightning_module.automatic_optimization:
        raise ValueError("gap_samples needs a training_step that returns its loss; manual optimisation has none: set gap_samples=0")
    _check_reachable(callback)


def _check_strategy(callback: Form, strategy: Any) -> None:
    own, other = type(callback).__name__, type(strategy).__name__
    if is_a(strategy, "FSDPStrategy", "DeepSpeedStrategy"):
        raise ValueError(f"{own} does not support {other}, which flattens the parameters; use DDPStrategy or ModelParallelStrategy (FSDP2)")
    if is_a(strategy, "ModelParallelStrategy") and not callback.takes_parts:
        raise ValueError(
            f"{own} does not support {other}: {callback.whole_because}; use the same penalty as to_penalty() or to_prox(), or DDPStrategy"
        )
    if is_a(strategy, "ModelParallelStrategy") and callback.gap_samples:
        raise ValueError(f"gap_samples runs the model with other weights, which {other} gathers by itself; set gap_samples=0")
    if getattr(strategy, "_model_averaging_period", None) is not None:
        raise ValueError(f"{own} does not support a model_averaging_period: between averages the ranks' weights, and zeros, differ")


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
        check_optimizer(callback, type(optimizer))
    updated = {name for optimizer in trainer.optimizers for name, *_ in callback._owned(optimizer)}
    missing = [name for name, parameter in callback.parameters.items() if parameter.requires_grad and name not in updated]
    if missing:
        raise ValueError(
            f"no optimiser updates the selected {missing[:5]}; exclude them with select={['!' + name for name in missing[:5]]}"
        )


def check_optimizer(callback: Form, kind: type[Any] | None) -> None:
    """A class of optimisers that cannot be used, where it is known."""
    if kind is not None and issubclass(kind, torch.optim.LBFGS):
        raise ValueError(
            f"{type(callback).__name__} cannot work with LBFGS, which calls the closure several times a step; use a first-order optimiser"
        )


def check_overlap(callback: Form, trainer: Trainer) -> None:
    """Two sparsity callbacks on one weight."""
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        taken = {id(p) for p in other.parameters.values()} if isinstance(other, SparsityCallback) and other is not callback else set()
        names = sorted(name for name, parameter in callback.parameters.items() if id(parameter) in taken)  # tied ones too
        if names:
            raise ValueError(f"two sparsity callbacks select {names[:5]}; give each its own with select=[...]")


def say_left_out(callback: Form, module: LightningModule) -> None:
    """Warn, once on rank 0, of weights that match the selection but are no parameters."""
    reasons = left_out(module, callback.select)
    if reasons:
        first, reason = next(iter(reasons.items()))
        more = f" ({len(reasons) - 1} more weights are left out)" if len(reasons) > 1 else ""
        spared = [*(callback.select or []), *("!" + name for name in list(reasons)[:5])]
        rank_zero_warn(f"{type(callback).__name__} leaves {first!r} out: it {reason}, or say so with select={spared}{more}")


def is_built_later(module: LightningModule) -> bool:
    """The module may still gain layers: it overrides setup or configure_model."""
    return overrides("setup", module) or overrides("configure_model", module)


def saves_on_exception(trainer: Trainer) -> bool:
    """Some callback writes a checkpoint when training fails."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return any(getattr(other, "save_on_exception", False) or is_a(other, "OnExceptionCheckpoint") for other in callbacks)


def check_closures(callback: Form, module: LightningModule, optimizer: torch.optim.Optimizer, count: int) -> None:
    """An optimiser that evaluated its closure again before stepping: the penalty and the masks are meant for one."""
    if count > 1 and module.automatic_optimization and len(module.trainer.optimizers) == 1:
        raise RuntimeError(
            f"{type(optimizer).__name__} evaluates the loss several times a step, which {type(callback).__name__} does not support; "
            "use an optimiser that calls its closure once"
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
        parameter = callback.parameters[name].detach()
        zeros = int(elementwise.sum_shards((elementwise.local_part(parameter) == 0).sum(), parameter))
        if taken.numel() != zeros:
            raise ValueError(
                f"the checkpoint keeps {taken.numel()} thresholded weights of {name!r}, but the loaded file has {zeros} zeros there: "
                "its weights were changed after it was written"
            )
