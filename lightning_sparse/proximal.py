"""Proximal steps: the reweighted (majorise-minimise) one and the exact one, in the optimiser's own metric."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sparse import _rates, numeric
from lightning_sparse.duality import Penalty


def step_size(optimizer: torch.optim.Optimizer, parameter: Tensor, group: dict[str, Any], metric: str) -> Tensor | float:
    """rho_j of a parameter's last step: how far a unit of its gradient moves a weight, of the part that this process holds.

    ``metric`` is "plain" (the learning rate), "adam" (lr / (sqrt(v_hat_j) + eps)), or "auto": the optimiser's own.
    """
    state = optimizer.state.get(parameter, {})
    if metric == "adam" and "exp_avg_sq" not in state:
        raise ValueError(f"metric='adam' needs second moments, which {type(optimizer).__name__} does not keep; use metric='plain'")
    own = None if metric == "plain" else _rates.adaptive(state, group)
    return float(group["lr"]) if own is None else own


def reweighted_step(penalty: Penalty, w: Tensor, rho: Tensor | float, lam: float) -> Tensor:
    """w / (1 + rho lam / eta_hat(w)): one majorise-minimise step of the prox, never an exact zero by itself."""
    pull = torch.as_tensor(rho * lam, dtype=w.dtype, device=w.device)
    return w / (1 + numeric.quotient(pull, penalty.eta_hat(w)))  # no pull, no move: also where eta_hat is 0


def exact_step(penalty: Penalty, w: Tensor, rho: Tensor | float, lam: float) -> Tensor:
    """argmin_x (x - w)^2 / 2 + rho lam omega(x)."""
    return penalty.prox(w, rho * lam)


def memory(group: dict[str, Any]) -> float:
    """Optimiser steps that momentum remembers, 1 / (1 - momentum) or 1 / (1 - beta_1); 1 without momentum."""
    return 1 / (1 - float(group["betas"][0] if "betas" in group else group.get("momentum", 0.0)))


def rests(penalty: Penalty, w: Tensor, rho: Tensor | float, lam: float, steps: float) -> Tensor:
    """Which weights the penalty alone would bring to rest at zero within ``steps`` optimiser steps of size ``rho``.

    That is where the prox of step * omega, step = steps * rho * lam, is zero: |w| <= min_x x/2 + step * omega(x) / x.
    A gradient step cannot land there: it carries the weight back and forth over the zero, as far as momentum remembers.
    """
    step = torch.as_tensor(steps * rho * lam, dtype=torch.float64, device=w.device)
    return w.abs() <= _reach(penalty, step).to(w.dtype)


def _reach(penalty: Penalty, step: Tensor) -> Tensor:
    """The largest |w| that the prox of step * omega maps to zero, interpolated over step where that is a tensor."""
    x = numeric.grid(1e-12, 1e4, 513).to(step.device)
    slope = penalty.omega(x) / x
    steps = _nodes(step) if step.dim() else step[None]
    edges = (x / 2 + steps[:, None] * slope).amin(1)
    if not step.dim():
        return torch.where(step > 0, edges[0], torch.zeros_like(step))
    index = (torch.searchsorted(steps, step, right=True) - 1).clamp(0, len(steps) - 2)
    share = (step - steps[index]) / (steps[index + 1] - steps[index])
    reach = edges[index] + (edges[index + 1] - edges[index]) * share
    return torch.where(step > 0, reach, torch.zeros_like(step))


def _nodes(step: Tensor) -> Tensor:
    """Quarter octaves around the positive steps, the same whatever else a tensor holds: a part of it gives what the whole gives."""
    if not step.numel():
        return step.new_ones(2)
    ends = torch.stack([torch.where(step > 0, step, torch.inf).min(), torch.where(step > 0, step, 0.0).max()])
    first, last = (ends.clamp(1e-30, 1e30).log2() * 4).floor().int().tolist() if ends[1] > 0 else (0, 0)
    return torch.arange(first, last + 2, dtype=step.dtype, device=step.device).div(4).exp2()
