"""How far an optimiser moves a weight per unit of its mean gradient, read from the optimiser's state and group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_sparse import shards


def adaptive(state: Mapping[str, Any], group: Mapping[str, Any], factor: float = 1.0) -> Tensor | None:
    """``factor`` times the rate of each weight, of the part that this process holds; None where there is one rate for all.

    Adam and its kin divide by sqrt(v_hat) + eps, RMSprop by sqrt(v) + eps, Adagrad by sqrt(sum) + eps, Adamax by a running
    maximum, Adadelta by the ratio of two running means.
    """
    rooted = of_root(state, group, factor)
    if rooted is not None:
        return over_root(*rooted)
    parts, lr = _parts(state), factor * float(group["lr"])
    rate: Tensor | None = None
    if "acc_delta" in parts:
        rate = lr * ((parts["acc_delta"] + group["eps"]) / (parts["square_avg"] + group["eps"])).sqrt()
    elif "square_avg" in parts:  # centred
        rate = lr / ((parts["square_avg"] - parts["grad_avg"] ** 2).clamp(min=0).sqrt() + group["eps"])
    elif "exp_inf" in parts:
        rate = lr / parts["exp_inf"]
    return rate


def of_root(state: Mapping[str, Any], group: Mapping[str, Any], factor: float = 1.0) -> tuple[Tensor, float, float] | None:
    """x, a and b of a rate that is a / (sqrt(x) + b), a tensor and two numbers: Adam's, RMSprop's (not centred) and Adagrad's."""
    parts, lr = _parts(state), factor * float(group["lr"])
    if "exp_avg_sq" in parts:
        root = math.sqrt(1 - group["betas"][1] ** float(state["step"]))  # of the correction: taken out of the tensor's root
        return parts.get("max_exp_avg_sq", parts["exp_avg_sq"]), lr * root, group["eps"] * root  # amsgrad divides by the maximum
    if "square_avg" in parts and not parts.keys() & {"acc_delta", "grad_avg"}:
        return parts["square_avg"], lr, group["eps"]
    if "sum" in parts:
        return parts["sum"], lr / (1 + (float(state["step"]) - 1) * group["lr_decay"]), group["eps"]
    return None


Kind = Literal["root", "tensor", "number"]


def kind_of(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> Kind:
    """Before its first step: what :func:`of_root` will find in its state, another rate for each weight, or one number for all."""
    if isinstance(optimizer, torch.optim.Adamax) or group.get("centered") or "rho" in group:
        return "tensor"
    return "root" if "betas" in group or "centered" in group or "initial_accumulator_value" in group else "number"


def over_root(x: Tensor, a: float | Tensor, b: float | Tensor) -> Tensor:
    """a / (sqrt(x) + b), as a product: a small rate is no half float."""
    return x.sqrt().add_(b).reciprocal_().mul_(a)


def _parts(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: shards.local(value) for name, value in state.items() if isinstance(value, Tensor) and value.dim()}


_READ = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "grad_avg", "acc_delta", "sum", "exp_inf")  # by :func:`adaptive`


def moments(state: Mapping[str, Any], parameter: Tensor) -> dict[str, Tensor]:
    """Of an optimiser's state, what it keeps for each weight and a rate is made of."""
    found = {name: state[name] for name in _READ if name in state}
    return {name: value for name, value in found.items() if isinstance(value, Tensor) and value.dim() and value.shape == parameter.shape}


def gain(group: Mapping[str, Any]) -> float:
    """How much momentum lengthens steps in the long run: (1 - dampening) / (1 - momentum) for SGD, for RMSprop alike.

    Adam's is a mean, which lengthens nothing.
    """
    if "dampening" not in group and "centered" not in group:
        return 1.0
    return (1 - float(group.get("dampening", 0.0))) / (1 - float(group["momentum"]))
