"""Find the KL weight of variational dropout from the labels of the first step, and lower it while the noise drives the loss up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.duality import Penalty
from lightning_sparse.loss_guard import ALL, SLACK, LossGuard
from lightning_sparse.loss_guard import is_state as is_guard
from lightning_sparse.methods.base import Run, Scale, Step
from lightning_sparse.penalties import Scaled
from lightning_sparse.per_label import PerLabel
from lightning_sparse.schedules import LinearWarmup
from lightning_sparse.state import entry, is_factor

WARM = 0.5  # share of the run over which a weight that was found rises
_WORTH_SAYING = 0.1  # a share of the KL weight


class KlWeight:
    """Watches the losses of a run for its KL weight.

    A weight that is not given is 1 / the labels of the training set, counted in the first step. A weight that was found, or one that
    was given under SGD, whose steps grow with the noise until the loss is NaN, is lowered while the loss rises.

    Args:
        per_label: counts the labels; None if the weight is given.
        divergence: the penalty that the weight multiplies.
    """

    def __init__(self, per_label: PerLabel | None, divergence: Penalty) -> None:
        self.per_label, self.divergence = per_label, divergence

    def reset(self, run: Run) -> None:
        """Reset before a new fit."""
        self.run, self.guard = run, LossGuard(ALL if self.per_label is None else SLACK)
        self._losses: list[Tensor] = []  # of the batches of this step
        self._told = False  # that the weight is held back
        self.watches = self.per_label is not None  # the losses: else no other moment is called
        if self.per_label is not None:
            self.per_label.reset()

    def begin(self, form: str) -> None:
        """Raise ValueError if labels are to be counted over an unknown number of batches."""
        if self.per_label is not None and self.per_label.is_open and math.isinf(self.run.batches):
            raise ValueError(
                f"{form} needs kl_weight: the loader has no length and the run no end, so that the labels of the training "
                "set cannot be counted; give kl_weight=1/N for N labels (tokens, windows, pixels), or max_steps"
            )

    # -- a step ------------------------------------------------------------------------------------------------------------

    def before_forward(self, batch: Any) -> None:
        """Start counting the labels of a batch."""
        if self.per_label is not None and self.run.support.frozen is None:
            self.per_label.begin(batch)

    def before_backward(self, loss: Tensor, scale: Scale) -> None:
        """Record the loss of a batch."""
        if self.per_label is not None:
            self.per_label.listen(loss)
        if self.run.strength.target is None and self.run.support.frozen is None:
            self._losses.append(loss.detach().reshape(()).float() / scale())

    def after_backward(self, scale: Scale) -> None:
        """Count the labels of a batch."""
        if self.per_label is not None:
            self.per_label.end(scale())

    def before_optimizer(self, step: Step, form: str) -> Penalty | None:
        """Train with a weight that is found now, and return its penalty; hold the strength back. A collective."""
        weight = self._find(form)
        penalty = None if weight is None else self._take(weight)
        step.lam = self.run.strength.lam
        self._hold_back(step)
        return penalty

    def _take(self, weight: float) -> Penalty:
        """Train with this weight from here on; return the penalty that it is worth."""
        self.run.strength.schedule = LinearWarmup(weight, WARM)
        return Scaled(self.divergence, math.sqrt(weight))

    def _find(self, form: str) -> float | None:
        """Return the weight of the labels counted so far, once; None if it is given or was found before."""
        if self.per_label is None or not self.per_label.is_open:
            return None
        weight, doubt, found = self.per_label.settle(self.run.total, self.run.batches, form)
        self.run.info(found)
        if doubt:
            self.run.warn(doubt)
        return weight

    def _hold_back(self, step: Step) -> None:
        """Lower the strength while it drives the mean loss of all processes up."""
        if not self._losses:
            return
        loss, self._losses = torch.stack(self._losses).mean(), []
        self.guard.observe(float(loss if self.run.mean is None else self.run.mean(loss)))
        self.run.strength.factor = self.guard.factor
        step.lam = self.run.strength.lam
        if self.guard.factor < _WORTH_SAYING and not self._told:
            self._told = True
            self.run.info(
                f"VariationalDropout holds its kl_weight back (now {step.lam:.3g}), because the noise that it asks for drives the training "
                "loss up: at this weight the data do not pay for the network's weights. Give a smaller kl_weight, or target_sparsity"
            )

    # -- state -------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the weight that was found and the guard's numbers."""
        found: dict[str, Any] = {"guard": self.guard.state_dict()} if self.guard.steps else {}
        if self.per_label is not None and not self.per_label.is_open:
            found["kl_weight"] = self.per_label.value
        return found

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the entry, unless ``state`` is one of :meth:`state_dict`."""
        if "kl_weight" in state:
            entry(state, "kl_weight", is_factor, "a finite number > 0")
        if "guard" in state:
            entry(state, "guard", is_guard, "a dict of a LossGuard's numbers")

    def load_state_dict(self, state: Mapping[str, Any]) -> Penalty | None:
        """Restore the state; return the penalty of a weight that was found before, or None."""
        if "guard" in state:
            self.guard.load_state_dict(state["guard"])
            self.run.strength.factor = self.guard.factor
        if self.per_label is None or "kl_weight" not in state:
            return None
        self.per_label.value = state["kl_weight"]
        return self._take(self.per_label.value)
