"""The zero region of a penalty's prox."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lightning_sparse import numeric
from lightning_sparse.duality import Penalty
from lightning_sparse.elementwise import is_frozen_config, map_chunks

_FIRST = -400  # in quarter octaves: steps from 2^-100 to 2^100


def in_zero_region(penalty: Penalty, w: Tensor, rho: Tensor | float, lam: float, steps: float) -> Tensor:
    """Return which weights the penalty alone would set to zero within ``steps`` optimiser steps of size ``rho``.

    There the prox of step * omega, with step = steps * rho * lam, is zero: |w| <= min_x x/2 + step * omega(x) / x.
    Gradient steps do not reach zero exactly: they oscillate around it, by up to ``steps`` steps (see optimizer.settling_steps).
    """
    step, size = torch.as_tensor(steps * rho * lam, device=w.device), w.abs()
    if not step.dim():
        return size <= torch.where(step > 0, _edges(penalty, step.double()[None])[0], 0.0).to(w.dtype)
    lines = [column.to(step.device) for column in (_known_lines(penalty) if is_frozen_config(penalty) else _lines(penalty, step.device))]
    return map_chunks(lambda size, step: size <= _between(step, *lines).to(w.dtype), size, step.expand_as(w))


def _edges(penalty: Penalty, steps: Tensor) -> Tensor:
    """Return for each step the largest |w| that the prox of step * omega maps to zero."""
    x = numeric.grid(1e-12, 1e4, 513).to(steps.device)
    return (x / 2 + steps[:, None] * (penalty.omega(x) / x)).amin(1)


def _lines(penalty: Penalty, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return, for each quarter octave of steps, the line between the edges at its ends: values at step 0, and slopes."""
    nodes = torch.arange(_FIRST, -_FIRST + 1, dtype=torch.float64, device=device).div(4).exp2()
    edges = _edges(penalty, nodes)
    slopes = edges.diff() / nodes.diff()
    return (edges[:-1] - slopes * nodes[:-1]).float(), slopes.float()


@lru_cache(maxsize=64)
def _known_lines(penalty: Penalty) -> tuple[Tensor, Tensor]:
    """Return the cached lines of every penalty that equals this one."""
    return _lines(penalty, torch.device("cpu"))


def _between(step: Tensor, starts: Tensor, slopes: Tensor) -> Tensor:
    """Return the edge at each step, on the line of its quarter octave; 0 at step 0."""
    step = step.float()
    index = step.log2().mul_(4).floor_().sub_(_FIRST).nan_to_num_(0.0).clamp_(0, len(slopes) - 1).int()
    return starts[index].addcmul_(slopes[index], step).masked_fill_(~(step > 0), 0.0)
