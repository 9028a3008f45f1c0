"""Exact proximal operators against a grid search with omega."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_sparse.duality import Penalty
from lightning_sparse.penalties import L1, MCP, SCAD, HardThreshold, LogSum, Lp, Ridge, Scaled

EXACT = [L1(), LogSum(2.0), LogSum(0.05), MCP(1.0), MCP(0.2), SCAD(3.7, 1.0), SCAD(2.1, 0.3), Lp(0.5), HardThreshold(0.7), Ridge(0.5)]
W = torch.cat([torch.linspace(0, 6, 61), torch.tensor([1e-3, 0.02, 20.0])]).double()


def searched(penalty: Penalty, w: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """Search the best of 20001 points of [0, w], refined once; return it and its cost."""
    shares = torch.linspace(0, 1, 20001, dtype=torch.float64)[:, None]
    points = shares * w
    best = points.gather(0, cost(penalty, points, w, step).argmin(0)[None])[0]
    near = (best + (shares[::10] - 0.5) * w / 5000).clamp(min=0)
    near = torch.cat([near, torch.zeros_like(w)[None]])
    values = cost(penalty, near, w, step)
    return near.gather(0, values.argmin(0)[None])[0], values.min(0).values


def cost(penalty: Penalty, x: Tensor, w: Tensor, step: float) -> Tensor:
    return (x - w) ** 2 / 2 + step * penalty.omega(x)


@pytest.mark.parametrize("step", [0.01, 0.3, 0.95, 1.0, 1.05, 2.7, 3.2, 12.0])
@pytest.mark.parametrize("penalty", EXACT, ids=repr)
def test_the_prox_is_the_minimiser_that_a_search_finds(penalty: Penalty, step: float) -> None:
    found, least = searched(penalty, W, step)
    x = penalty.prox(W, step)
    assert (cost(penalty, x, W, step) <= least + 1e-12).all()
    apart = (x - found).abs() > 1e-6 * (1 + W)
    tied = (cost(penalty, x, W, step) - least).abs() < 1e-9 * (1 + least)
    assert not (apart & ~tied).any(), W[apart & ~tied]


@pytest.mark.parametrize("penalty", [*EXACT, Lp(1.3), Scaled(LogSum(1.0), 0.2)], ids=repr)
def test_a_step_for_each_weight_and_the_sign(penalty: Penalty) -> None:
    w = torch.tensor([[-3.0, 0.4, 1.5], [0.0, -0.9, 30.0]], dtype=torch.float64)
    steps = torch.tensor([[0.1, 0.3, 2.0], [1.0, 0.05, 5.0]], dtype=torch.float64)
    each = [[float(penalty.prox(a, float(b))) for a, b in zip(*rows, strict=True)] for rows in zip(w, steps, strict=True)]
    torch.testing.assert_close(penalty.prox(w, steps), torch.tensor(each, dtype=torch.float64))
    torch.testing.assert_close(penalty.prox(-w, steps), -penalty.prox(w, steps))


@pytest.mark.parametrize("penalty", EXACT, ids=repr)
def test_float32_stays_near_float64(penalty: Penalty) -> None:
    w = torch.linspace(-4, 4, 173)
    torch.testing.assert_close(penalty.prox(w, 0.35).double(), penalty.prox(w.double(), 0.35), rtol=1e-4, atol=1e-6)


def test_a_step_of_zero_moves_nothing() -> None:
    w = torch.tensor([-2.0, -1e-6, 0.0, 0.3, 1e4], dtype=torch.float64)
    for penalty in EXACT:
        torch.testing.assert_close(penalty.prox(w, 0.0), w, rtol=1e-12, atol=0)


def test_the_l0_threshold() -> None:
    w = torch.tensor([-0.701, 0.699, 0.99, 1.01])
    assert HardThreshold(0.7).prox(w, 1.0).ne(0).tolist() == [True, False, True, True]
    assert HardThreshold(0.7).prox(w, 2.0).ne(0).tolist() == [False, False, True, True]  # 0.7 sqrt 2 = 0.98995
