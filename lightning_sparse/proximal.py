"""Proximal steps: the reweighted (majorise-minimise) one and the exact one, in the optimiser's own metric."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sparse.duality import Penalty


def step_size(optimizer: torch.optim.Optimizer, parameter: Tensor, group: dict[str, Any], metric: str) -> Tensor | float:
    """rho_j of a parameter's last step: lr, or lr / (sqrt(v_hat_j) + eps) in Adam's metric.

    ``metric`` is "plain", "adam", or "auto": Adam's where the optimiser keeps second moments.
    """
    state = optimizer.state.get(parameter, {})
    if metric == "plain" or (metric == "auto" and "exp_avg_sq" not in state):
        return float(group["lr"])
    moment: Tensor = state.get("max_exp_avg_sq", state["exp_avg_sq"])  # amsgrad divides by the maximum
    correction = 1 - group["betas"][1] ** float(state["step"])
    rho: Tensor = group["lr"] / ((moment / correction).sqrt() + group["eps"])
    return rho


def reweighted_step(penalty: Penalty, w: Tensor, rho: Tensor | float, lam: float) -> Tensor:
    """w / (1 + rho lam / eta_hat(w)): one majorise-minimise step of the prox, never an exact zero by itself."""
    return w / (1 + rho * lam / penalty.eta_hat(w))


def exact_step(penalty: Penalty, w: Tensor, rho: Tensor | float, lam: float) -> Tensor:
    """argmin_x (x - w)^2 / 2 + rho lam omega(x)."""
    return penalty.prox(w, rho * lam)


SETTLE_STEPS = 10  # the memory of momentum 0.9; 3 to 100 gave the same network at a constant learning rate


def rests(penalty: Penalty, w: Tensor, rho: Tensor | float, lam: float, steps: int = SETTLE_STEPS) -> Tensor:
    """Which weights the penalty alone would bring to rest at zero within ``steps`` optimiser steps of size ``rho``.

    That is where the exact prox of steps * rho * lam * omega is zero. Other weights are left as they are.
    """
    return penalty.prox(w, steps * rho * lam) == 0
