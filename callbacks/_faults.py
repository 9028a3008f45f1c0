"""Values that are not finite, in loss, gradients and weights: the run stops before they reach a weight or a file.

The cost is one pass over the selected gradients a step (1 to 2 % of a plain step on the CPU) and one over the selected
weights an epoch. A GradScaler skips such steps by itself, and a module with hooks of its own between backward and the
step may mend its gradients there: then the gradients are left to them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_sparse import elementwise
from lightning_sparse.callbacks import compatibility

if TYPE_CHECKING:
    from lightning_sparse.callbacks._form import Form

_MENDERS = ("on_before_optimizer_step", "configure_gradient_clipping")  # they come after the callbacks' hooks


def check_loss(callback: Form, trainer: Trainer, loss: Tensor) -> None:
    """A loss that is not finite raises FloatingPointError before its gradient is taken.

    Under a GradScaler inf is what a scale too large gives, and the step will be skipped: only NaN raises. Beside other
    ranks, none of which may be left waiting, it is seen in the averaged gradients; where those are left alone, all are asked.
    """
    fits = _is_number if _scaled(trainer) else math.isfinite
    values = [loss.item()] if loss.numel() == 1 else loss.detach().flatten().tolist()  # one is read at once: no operation on it
    bad = not all(map(fits, values))
    if trainer.world_size > 1:
        bad = _left_alone(callback, trainer) and trainer.strategy.reduce_boolean_decision(bad, all=False)
    if bad:
        value, step = float(loss.detach().sum()), callback.step
        harmed = elementwise.count_nonfinite({name: callback._live(name) for name in callback.parameters})
        state = f"{_listed(harmed)} since an earlier step; files written before that are whole" if harmed else _WHOLE
        raise FloatingPointError(f"the loss is {value} at optimiser step {step}; {state}. {_remedy(callback)}")


def _remedy(callback: Form) -> str:
    """What to do about it, in the arguments that the callback was given."""
    given = callback.settings()
    own: list[str] = [name for name in ("lam", "kl_weight") if name in given and callback.target_sparsity is None]
    own += ["learned_lr, the rate of the form's own parameters,"] if "learned_lr" in given else []
    lowered = ", ".join(["the learning rate", *own[:-1]]) + (f" or {own[-1]}" if own else "")
    return f"Check the data, lower {lowered.rstrip(',')}, or clip gradients"


def _is_number(value: float) -> bool:
    return not math.isnan(value)


_WHOLE = "the weights are those before this batch"


def check_gradients(callback: Form, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
    """Gradients of selected weights that are not finite, of a loss that is, raise FloatingPointError before the step."""
    if _left_alone(callback, trainer):
        return
    clipped = bool(trainer.gradient_clip_val) and trainer.gradient_clip_algorithm == "value"
    grads = {name: p.grad for name, p, _ in callback._owned(optimizer) if p.grad is not None}
    unknown = elementwise.maybe_nonfinite(grads)
    if unknown and (found := elementwise.count_nonfinite(unknown, nan_only=clipped)):  # clipping by value makes inf finite
        cause = "while the loss is finite" if trainer.world_size == 1 else "from the loss of this rank or of another"
        raise FloatingPointError(
            f"the gradient of {_listed(found)} at optimiser step {callback.step}, {cause}; {_WHOLE}. "
            f"{_remedy(callback)}; Trainer(detect_anomaly=True) names the operation"
        )


def check_start(callback: Form) -> None:
    """Selected weights that are not finite before the first step: ValueError."""
    if found := elementwise.count_nonfinite({name: callback._live(name) for name in callback.parameters}):
        raise ValueError(f"{_listed(found)} before training starts; initialise them, or resume from a file that was written earlier")


def check_weights(callback: Form) -> None:
    """Selected weights that are no longer finite: FloatingPointError, before they are evaluated or saved."""
    if found := elementwise.count_nonfinite({name: callback._live(name) for name in callback.parameters}):
        raise FloatingPointError(
            f"{_listed(found)} after optimiser step {callback.step}; files written before that are whole: resume from one. "
            f"{_remedy(callback)}"
        )


def _listed(found: Mapping[str, tuple[int, int]]) -> str:
    first = [f"{name!r} holds {nan} NaN and {inf} infinite values" for name, (nan, inf) in list(found.items())[:3]]
    return ", ".join(first) + (f" and {len(found) - 3} more parameters hold such values" if len(found) > 3 else "")


def own_hooks(module: LightningModule) -> frozenset[str]:
    """The hooks of ``module``'s own that come between a backward and its step; looked up once a fit, since it takes long."""
    return frozenset(hook for hook in _MENDERS if compatibility.overrides(hook, module))


def _left_alone(callback: Form, trainer: Trainer) -> bool:
    """A GradScaler skips what is not finite, or the module may mend it."""
    return bool(callback._own_hooks) or _scaled(trainer)


def _scaled(trainer: Trainer) -> bool:
    """A GradScaler is at work: it skips the steps whose gradients are not finite."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and scaler.is_enabled()
