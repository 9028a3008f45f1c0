"""Each method in a plain torch loop equals a hand-written loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sparse.elementwise import Engine
from lightning_sparse.methods.base import Method, Step
from lightning_sparse.methods.gradient import LossTerm, ReweightedGradient
from lightning_sparse.methods.proximal import Proximal
from lightning_sparse.penalties import L1, MCP, LogSum

LAM, STEPS = 0.02, 60
PENALTIES = [LogSum(0.5), MCP(0.7), L1()]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


def problem() -> tuple[Tensor, Tensor]:
    """Make a regression problem with two relevant inputs of ten."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 10, generator=generator)
    return x, x[:, :1] - 0.5 * x[:, 1:2]


def network() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(10, 1, bias=False)


def trained(method: Method, make: Callable[[Any], torch.optim.Optimizer]) -> Tensor:
    """Train with a method in a plain torch loop."""
    (x, y), net, engine = problem(), network(), Engine()
    optimizer = make(net.parameters())
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        step = Step(optimizer, [("weight", net.weight, optimizer.param_groups[0])], LAM, engine)
        method.before_optimizer(step)
        optimizer.step()
        method.after_optimizer(step)
    return net.weight.detach()


def by_hand(
    make: Callable[[Any], torch.optim.Optimizer],
    gradient: Callable[[Tensor], Tensor] | None = None,
    prox: Callable[[Tensor, Any], Tensor] | None = None,
) -> Tensor:
    """Train by the formulas, with Adam's step size computed by hand."""
    (x, y), net = problem(), network()
    optimizer = make(net.parameters())
    for number in range(1, STEPS + 1):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        w = net.weight
        if gradient is not None:
            w.grad += LAM * gradient(w.detach())  # type: ignore[operator]
        optimizer.step()
        if prox is not None:
            rate: Any = optimizer.param_groups[0]["lr"]
            if isinstance(optimizer, torch.optim.Adam):
                v = optimizer.state[w]["exp_avg_sq"] / (1 - 0.999**number)
                rate = rate / (v.sqrt() + 1e-8)
            with torch.no_grad():
                w.copy_(prox(w.detach(), LAM * rate))
    return net.weight.detach()


every_case = pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


@every_case
@every_optimizer
def test_the_gradient_form_adds_the_slope_of_the_penalty(penalty: Any, make: Any) -> None:
    wanted = by_hand(make, gradient=lambda w: torch.where(w == 0, 0.0, w / penalty.eta_hat(w)))
    torch.testing.assert_close(trained(ReweightedGradient(penalty), make), wanted, rtol=1e-4, atol=1e-6)


@every_case
@every_optimizer
def test_the_loss_form_adds_autograds_gradient_of_omega(penalty: Any, make: Any) -> None:
    def slope(w: Tensor) -> Tensor:
        leaf = w.clone().requires_grad_()
        return torch.autograd.grad(penalty.omega(leaf).sum(), leaf)[0]

    torch.testing.assert_close(trained(LossTerm(penalty), make), by_hand(make, gradient=slope), rtol=1e-4, atol=1e-6)


@every_case
@every_optimizer
def test_the_proximal_form_shrinks_by_the_step_size(penalty: Any, make: Any) -> None:
    wanted = by_hand(make, prox=lambda w, step: w / (1 + step / penalty.eta_hat(w).clamp(min=1e-38)))
    torch.testing.assert_close(trained(Proximal(penalty), make), wanted, rtol=1e-4, atol=1e-6)


@every_optimizer
def test_the_exact_prox_of_l1_is_the_soft_threshold_and_leaves_exact_zeros(make: Any) -> None:
    wanted = by_hand(make, prox=lambda w, step: w.sign() * (w.abs() - step).clamp(min=0))
    found = trained(Proximal(L1(), exact=True), make)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert torch.equal(found == 0, wanted == 0)
    assert bool((found != 0)[0, :2].all())


def test_a_maximising_group_and_a_scaled_gradient_turn_and_scale_the_penalty() -> None:
    net, engine = network(), Engine()
    optimizer = torch.optim.SGD([{"params": [net.weight], "maximize": True}], lr=0.1)
    net.weight.grad = torch.zeros_like(net.weight)
    step = Step(optimizer, [("weight", net.weight, optimizer.param_groups[0])], LAM, engine, grad_scale=8.0)
    ReweightedGradient(L1()).before_optimizer(step)
    torch.testing.assert_close(net.weight.grad, -8 * LAM * net.weight.detach().sign())


def test_weights_without_a_gradient_are_left_alone() -> None:
    net, engine = network(), Engine()
    optimizer, before = torch.optim.SGD(net.parameters(), lr=0.1), net.weight.detach().clone()
    step = Step(optimizer, [("weight", net.weight, optimizer.param_groups[0])], 1.0, engine)
    for method in (ReweightedGradient(L1()), Proximal(L1(), exact=True)):
        method.before_optimizer(step)
        method.after_optimizer(step)
    assert net.weight.grad is None
    assert torch.equal(net.weight.detach(), before)


@pytest.mark.parametrize("bounded", [True, False])
def test_a_bounded_prox_moves_a_weight_without_gradients_by_the_learning_rate_at_most(bounded):
    net, lr = nn.Linear(4, 1, bias=False), 1e-3
    optimizer, engine = torch.optim.Adam(net.parameters(), lr), Engine()
    method = Proximal(L1(), exact=True, bounded=bounded)
    before = net.weight.detach().fill_(0.05).clone()
    net.weight.grad = torch.tensor([[0.0, 1e-9, 1.0, 0.0]])
    step = Step(optimizer, [("weight", net.weight, optimizer.param_groups[0])], 0.01, engine)
    optimizer.step()
    stepped = net.weight.detach().clone()
    method.after_optimizer(step)
    moved = (net.weight.detach() - stepped).abs()
    if bounded:
        assert float(moved.max()) <= lr
        assert bool((net.weight != 0).all())
        assert moved[0, 2] == pytest.approx(lr * 0.01 / 1.01, rel=1e-3)
    else:
        assert net.weight[0, 0] == 0
        assert moved[0, 2] == pytest.approx(lr * 0.01, rel=1e-3)
    assert float(before[0, 0]) == pytest.approx(0.05)
