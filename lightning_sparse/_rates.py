"""How far an optimiser moves a weight per unit of its mean gradient, read from the optimiser's state and group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_sparse import shards


def adaptive(state: Mapping[str, Any], group: Mapping[str, Any], factor: float = 1.0) -> Tensor | None:
    """``factor`` times the rate of each weight, of the part that this process holds; None where there is one rate for all.

    Adam and its kin divide by sqrt(v_hat) + eps, RMSprop by sqrt(v) + eps, Adagrad by sqrt(sum) + eps, Adamax by a running
    maximum, Adadelta by the ratio of two running means.
    """
    parts = {name: shards.local(value) for name, value in state.items() if isinstance(value, Tensor) and value.dim()}
    lr = factor * float(group["lr"])
    rate: Tensor | None = None
    if "exp_avg_sq" in parts:
        moment = parts.get("max_exp_avg_sq", parts["exp_avg_sq"])  # amsgrad divides by the maximum
        root = math.sqrt(1 - group["betas"][1] ** float(state["step"]))  # of the correction: taken out of the tensor's root
        rate = moment.sqrt().add_(group["eps"] * root).reciprocal_().mul_(lr * root)  # a product: a small lr is no half float
    elif "acc_delta" in parts:
        rate = lr * ((parts["acc_delta"] + group["eps"]) / (parts["square_avg"] + group["eps"])).sqrt()
    elif "square_avg" in parts:
        spread = parts["square_avg"] - parts["grad_avg"] ** 2 if "grad_avg" in parts else parts["square_avg"]  # centred or not
        rate = lr / (spread.clamp(min=0).sqrt() + group["eps"])
    elif "sum" in parts:
        rate = lr / (1 + (float(state["step"]) - 1) * group["lr_decay"]) / (parts["sum"].sqrt() + group["eps"])
    elif "exp_inf" in parts:
        rate = lr / parts["exp_inf"]
    return rate


def moments(state: Mapping[str, Any], parameter: Tensor) -> dict[str, Tensor]:
    """Of an optimiser's state, what it keeps for each weight."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and value.dim() and value.shape == parameter.shape}


def gain(group: Mapping[str, Any]) -> float:
    """How much momentum lengthens steps in the long run: (1 - dampening) / (1 - momentum) for SGD, for RMSprop alike.

    Adam's is a mean, which lengthens nothing.
    """
    if "dampening" not in group and "centered" not in group:
        return 1.0
    return (1 - float(group.get("dampening", 0.0))) / (1 - float(group["momentum"]))
