"""Compute what an optimiser does to a gradient: step size, momentum, clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse import elementwise

SETTLING = 10.0  # least number of steps by which a weight at rest oscillates where steps are scaled: the memory of Adam's beta_1 = 0.9

# -- step size: how far a unit of the mean gradient moves a weight ---------------------------------------------------------

Terms = tuple[tuple[Tensor, ...], tuple[float, ...]]  # tensors and numbers that a step size is computed from
Kind = Literal["root", "tensor", "number"]


def step_size_terms(state: Mapping[str, Any], group: Mapping[str, Any], metric: str, factor: float = 1.0) -> Terms:
    """Split ``factor`` times a step size into tensors and numbers, from which :func:`step_size` computes it.

    ``metric`` is "plain" (the learning rate), "adam" (lr / (sqrt(v_hat_j) + eps)), or "auto": the optimiser's own. ValueError
    for "adam" without second moments.
    """
    if metric == "adam" and "exp_avg_sq" not in state:
        raise ValueError("metric='adam' needs second moments, which this optimiser does not keep; use metric='plain'")
    if metric != "plain" and (root := _root_terms(state, group, factor)) is not None:
        return root
    own = None if metric == "plain" else _other_step_size(state, group, factor)
    return ((), (factor * float(group["lr"]),)) if own is None else ((own,), ())


def read_step_size(optimizer: Optimizer, parameter: Tensor, group: Mapping[str, Any], metric: str = "auto") -> Any:
    """Return the step size of a parameter's last step, a tensor or a number: how far a unit of its gradient moves a weight."""
    return step_size_of(optimizer.state.get(parameter, {}), group, metric)


def step_size_of(state: Mapping[str, Any], group: Mapping[str, Any], metric: str = "auto", factor: float = 1.0) -> Any:
    """Return ``factor`` times the step size of a parameter's state and group, a tensor or a number."""
    tensors, scalars = step_size_terms(state, group, metric, factor)
    return step_size(*tensors, *scalars)


def step_size(*terms: Any) -> Any:
    """Compute a step size of its terms: a / (sqrt(x) + b) of (x, a, b), else the one tensor or number itself."""
    if len(terms) == 1:
        return terms[0]
    x, a, b = terms
    return x.sqrt().add_(b).reciprocal_().mul_(a)  # multiplied last, because a small step size is not representable in half precision


def _root_terms(state: Mapping[str, Any], group: Mapping[str, Any], factor: float) -> Terms | None:
    """Return the terms of a / (sqrt(x) + b): Adam's and its kin's, RMSprop's (not centred) and Adagrad's."""
    parts, lr = _per_weight(state), factor * float(group["lr"])
    if "exp_avg_sq" in parts:
        root = math.sqrt(1 - group["betas"][1] ** float(state["step"]))  # bias correction, moved out of the tensor's square root
        second = parts.get("max_exp_avg_sq", parts["exp_avg_sq"])  # amsgrad divides by the maximum
        return (second,), (lr * root, group["eps"] * root)
    if "square_avg" in parts and not parts.keys() & {"acc_delta", "grad_avg"}:
        return (parts["square_avg"],), (lr, group["eps"])
    if "sum" in parts:
        return (parts["sum"],), (lr / (1 + (float(state["step"]) - 1) * group["lr_decay"]), group["eps"])
    return None


def _other_step_size(state: Mapping[str, Any], group: Mapping[str, Any], factor: float) -> Tensor | None:
    """Return the step size of Adadelta, centred RMSprop and Adamax; None where one number serves all weights."""
    parts, lr = _per_weight(state), factor * float(group["lr"])
    found: Tensor | None = None
    if "acc_delta" in parts:
        found = lr * ((parts["acc_delta"] + group["eps"]) / (parts["square_avg"] + group["eps"])).sqrt()
    elif "square_avg" in parts:
        found = lr / ((parts["square_avg"] - parts["grad_avg"] ** 2).clamp(min=0).sqrt() + group["eps"])
    elif "exp_inf" in parts:
        found = lr / parts["exp_inf"]
    return found


def _per_weight(state: Mapping[str, Any]) -> dict[str, Tensor]:
    values = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.dim()}
    return {name: value if type(value) is Tensor else elementwise.local_part(value) for name, value in values.items()}


def step_size_kind(optimizer: Optimizer, group: Mapping[str, Any]) -> Kind:
    """Predict before the first step what :func:`step_size_terms` will return: (x, a, b), a tensor, or a number."""
    if isinstance(optimizer, torch.optim.Adamax) or group.get("centered") or "rho" in group:
        return "tensor"
    return "root" if "betas" in group or "centered" in group or "initial_accumulator_value" in group else "number"


class StepSizeGroup(NamedTuple):
    """Weights whose step size has the same scalars: one column of weights, then those of the step size's tensors."""

    columns: list[list[Tensor]]
    scalars: tuple[float, ...]


def by_step_size(rows: Iterable[tuple[Mapping[str, Any], Mapping[str, Any], float, Tensor]], metric: str) -> list[StepSizeGroup]:
    """Group weights by the scalars of their step size; a row is an optimiser's state and group, a factor, and the weights."""
    groups: dict[tuple[Any, ...], StepSizeGroup] = {}
    for state, group, factor, w in rows:
        tensors, scalars = step_size_terms(state, group, metric, factor)
        found = groups.setdefault((len(tensors), scalars), StepSizeGroup([[] for _ in range(1 + len(tensors))], scalars))
        for column, tensor in zip(found.columns, (w, *tensors), strict=True):
            column.append(tensor)
    return list(groups.values())


# -- momentum --------------------------------------------------------------------------------------------------------------


def momentum_gain(group: Mapping[str, Any]) -> float:
    """Return the factor by which momentum lengthens steps in the long run: (1 - dampening) / (1 - momentum) for SGD and RMSprop.

    1 for Adam, whose first moment is a mean.
    """
    if "dampening" not in group and "centered" not in group:
        return 1.0
    return (1 - float(group.get("dampening", 0.0))) / (1 - float(group["momentum"]))


def momentum_memory(group: Mapping[str, Any]) -> float:
    """Return the number of optimiser steps that momentum averages over, 1 / (1 - momentum) or 1 / (1 - beta_1); 1 without momentum."""
    return 1 / (1 - float(group["betas"][0] if "betas" in group else group.get("momentum", 0.0)))


def settling_steps(group: Mapping[str, Any], scaled: bool) -> float:
    """Return the number of steps by which a weight at rest oscillates around zero: momentum's memory, at least SETTLING if ``scaled``.

    ``scaled`` means that the optimiser divides each weight's gradient by the size of its gradients, so that even pure noise moves a
    weight by about the learning rate a step. Averaging the gradients changes neither the drift nor the spread that add up over many
    steps: with beta_1 = 0, RMSprop, Adagrad and Adadelta weights at rest oscillate as far as with Adam's beta_1 = 0.9.
    """
    memory = momentum_memory(group)
    return max(memory, SETTLING) if scaled else memory


# -- clipping and AMP ------------------------------------------------------------------------------------------------------


class ClipFactor:
    """Measures the factor by which clipping changes the norm of some gradients: ``last`` at the last step, and their ``mean``.

    Both are 1 without clipping. Clipping by norm multiplies the whole gradient, penalty included, by a factor. Adam divides by
    second moments of clipped gradients, so a penalty lam / sqrt(v) that is not multiplied by the same factor would be too large by
    its inverse.
    """

    DECAY = 0.9  # weight of the past in the mean

    def __init__(self) -> None:
        self.last, self.mean = 1.0, 1.0
        self.norm: Tensor | None = None  # before clipping, while the step has not ended
        self._measured = False

    def before_clipping(self, gradients: Iterable[Any]) -> None:
        """Measure the gradients right before they are clipped; not called without clipping."""
        self.norm = _norm(gradients)

    def after_step(self, gradients: Iterable[Any]) -> None:
        """Measure the gradients again, after the optimiser step that used them."""
        if self.norm is None:
            return
        factor, self.norm = float(_norm(gradients) / self.norm), None
        if math.isfinite(factor) and factor > 0:
            self.last, self.mean = factor, self.DECAY * self.mean + (1 - self.DECAY) * factor if self._measured else factor
            self._measured = True

    def resume(self, mean: float) -> None:
        """Continue from the mean factor of an interrupted run; a value of 1 may mean that nothing was measured."""
        self.mean, self._measured = mean, mean != 1


@torch.no_grad()
def _norm(gradients: Iterable[Any]) -> Tensor:
    given = [grad.detach() for grad in gradients if grad is not None]
    squares = [elementwise.sum_shards(elementwise.local_part(grad).float().square().sum(), grad) for grad in given]
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt() if squares else torch.ones(())


def grad_scale(scaler: Any, optimizer: Optimizer) -> float:
    """Return the factor for an added gradient: the GradScaler's scale if a fused optimiser unscales by itself, else 1."""
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())
