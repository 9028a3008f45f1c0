"""Methods on groups in a plain torch loop equal hand-written loops over the groups' sizes."""

from __future__ import annotations

import pytest
import torch
from test_bare_loop import LAM, OPTIMIZERS, problem
from torch import Tensor, nn
from toys import several

from lightning_sparse.duality import Penalty
from lightning_sparse.methods.base import Method, Run, Step
from lightning_sparse.methods.gradient import LossTerm, ReweightedGradient
from lightning_sparse.methods.proximal import Proximal
from lightning_sparse.penalties import L1, MCP, LogSum
from lightning_sparse.schedules import Constant
from lightning_sparse.step import Strength
from lightning_sparse.structure import Blocks, Columns, Rows, Structure

STEPS = 40
every_case = pytest.mark.parametrize("penalty", [LogSum(0.5), MCP(0.7), L1()], ids=repr)
every_structure = pytest.mark.parametrize("structure", [Rows(), Columns(), Blocks((2, 3))], ids=repr)
every_optimizer = pytest.mark.parametrize("make", several(dict(OPTIMIZERS), "SGD", "Adam"))


def network() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(10, 4, bias=False)


def trained(method: Method, make: object, structure: Structure) -> Tensor:
    """Train with a method in a plain torch loop."""
    (x, y), net = problem(), network()
    optimizer = make(net.parameters())  # type: ignore[operator]
    run = Run.alone(method, {"weight": net.weight}, Strength(Constant(LAM)), structure)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y.expand(-1, 4)).backward()
        step = Step(optimizer, [("weight", net.weight, optimizer.param_groups[0])], LAM, run.engine)
        run.support.weights.attach(net, [optimizer], lambda name: net.weight.detach())
        run.before_optimizer(method, step)
        optimizer.step()
        run.after_optimizer(method, step)
    return net.weight.detach()


def rms(w: Tensor, structure: Structure) -> Tensor:
    return (structure.pool(w * w) / structure.pool(torch.ones_like(w))).sqrt()


@every_case
@every_structure
@every_optimizer
@pytest.mark.parametrize("kind", [ReweightedGradient, LossTerm])
def test_the_gradient_is_that_of_the_groups_penalty(penalty: Penalty, structure: Structure, make: object, kind: type[Method]) -> None:
    (x, y), net = problem(), network()
    optimizer = make(net.parameters())  # type: ignore[operator]
    for _ in range(STEPS):
        optimizer.zero_grad()
        cost = (structure.pool(torch.ones_like(net.weight)) * penalty.omega(rms(net.weight, structure))).sum()
        (nn.functional.mse_loss(net(x), y.expand(-1, 4)) + LAM * cost).backward()
        optimizer.step()
    torch.testing.assert_close(trained(kind(penalty), make, structure), net.weight.detach(), rtol=2e-3, atol=2e-5)


@every_case
@every_structure
def test_the_exact_prox_minimises_over_whole_groups(penalty: Penalty, structure: Structure) -> None:
    """Compared with a search over the factor of each group, of |x - w|^2 / 2 + t d omega(rms(x))."""
    method = Proximal(penalty, "plain", exact=True)
    net = network()
    before = net.weight.detach().clone()
    net.weight.grad = torch.zeros_like(net.weight)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    run = Run.alone(method, {"weight": net.weight}, Strength(Constant(0.02)), structure)
    run.after_optimizer(method, Step(optimizer, [("weight", net.weight, optimizer.param_groups[0])], 0.02, run.engine))
    factors = torch.linspace(0, 1, 2001)
    count, size = structure.pool(torch.ones_like(before)), rms(before, structure)
    grid = torch.stack([count * ((1 - f) ** 2 * size**2 / 2 + 0.02 * penalty.omega(f * size)) for f in factors])
    best = factors[grid.argmin(0)]
    found = structure.pool(net.weight.detach() * before) / structure.pool(before * before)
    torch.testing.assert_close(found, best, rtol=0, atol=2e-3)
    torch.testing.assert_close(net.weight.detach(), before * structure.spread(found, before), rtol=1e-5, atol=1e-6)


def test_adams_step_size_of_a_group_is_that_of_the_mean_second_moment() -> None:
    method, structure, net = Proximal(L1(), "auto", exact=True), Rows(), network()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    net.weight.grad = torch.randn_like(net.weight)
    optimizer.step()
    before = net.weight.detach().clone()
    run = Run.alone(method, {"weight": net.weight}, Strength(Constant(0.1)), structure)
    run.after_optimizer(method, Step(optimizer, [("weight", net.weight, optimizer.param_groups[0])], 0.1, run.engine))
    rate = 0.01 / (net.weight.grad.square().mean(1, keepdim=True).sqrt() + 1e-8)
    wanted = before * (1 - 0.1 * rate / rms(before, structure)).clamp(min=0)
    torch.testing.assert_close(net.weight.detach(), wanted)
