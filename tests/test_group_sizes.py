"""What the size r_g and the number of weights d_g of coupled groups count: the weights that carry the scale, and no others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_sparse import penalties
from lightning_sparse.methods.base import Method, Run, Step
from lightning_sparse.methods.gradient import ReweightedGradient
from lightning_sparse.schedules import Constant
from lightning_sparse.step import Strength
from lightning_sparse.structure import Channels

pytest.importorskip("torch_pruning")
LAM, LOG_SUM = 0.05, penalties.LogSum(eps=0.5)


class Normed(nn.Module):
    """A convolution with batch norm, read by another convolution; optionally added to that of a second branch."""

    def __init__(self, branches: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.makes = nn.ModuleList(nn.Conv2d(3, 5, 3, bias=False) for _ in range(branches))
        self.norms = nn.ModuleList(nn.BatchNorm2d(5) for _ in range(branches))
        self.reads = nn.Conv2d(5, 2, 3)
        for norm in self.norms:
            nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.reads(sum(norm(make(x)) for make, norm in zip(self.makes, self.norms, strict=True)).relu())
        return out


def images() -> Tensor:
    return torch.randn(4, 3, 7, 7, generator=torch.Generator().manual_seed(0))


def run_of(net: nn.Module, x: Tensor, method: Method | None = None) -> Run:
    parameters = {name: p for name, p in net.named_parameters() if p.dim() > 1}
    return Run.alone(method or ReweightedGradient(LOG_SUM), parameters, Strength(Constant(LAM)), Channels(), module=net, example_inputs=x)


def weights(run: Run) -> dict[str, Tensor]:
    return run.support.weights.all_live()


@pytest.mark.parametrize("branches", [1, 2])
def test_with_batch_norm_the_size_is_that_of_its_weights_and_biases(branches: int) -> None:
    net = Normed(branches)
    run = run_of(net, images())
    groups = run.support.groups
    ((leader, _),) = groups.parts.items()
    carriers = torch.stack([p.detach() for norm in net.norms for p in (norm.weight, norm.bias)])
    assert groups.count(leader, run.support.weights.live).tolist() == [2 * branches] * 5
    torch.testing.assert_close(groups.size(leader, run.support.weights.live), carriers.square().mean(0).sqrt())
    gone = sum(make.weight[0].numel() for make in net.makes) + net.reads.weight[:, :1].numel() + 2 * branches
    one = {leader: torch.arange(5) == 3}
    zeros = groups.zeros(one, weights(run), {leader: carriers.square().mean(0)})
    assert sum(int(mask.sum()) for mask in zeros.values()) == gone > 2 * branches  # more vanish than count


def test_without_batch_norm_it_is_that_of_the_rows_and_biases_that_make_the_channel() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    run = run_of(net, torch.randn(4, 6))
    groups = run.support.groups
    ((leader, _),) = groups.parts.items()
    first = torch.cat([net[0].weight.detach(), net[0].bias.detach()[:, None]], 1)
    assert groups.count(leader, run.support.weights.live).tolist() == [7] * 5
    torch.testing.assert_close(groups.size(leader, run.support.weights.live), first.square().mean(1).sqrt())


def test_rows_in_front_of_batch_norm_change_nothing() -> None:
    """What does not change the network changes neither penalty nor keep probability nor eta; the rms of all weights would."""
    net, x = Normed(), images()
    run = run_of(net, x)
    names = [name for name in weights(run) if name.startswith("norms")]

    def state() -> list[Tensor]:
        support = run.support
        return [net(x).detach(), torch.tensor(support.penalty_value(weights(run))), *(support.keep_probability(name) for name in names)]

    def everything() -> Tensor:  # the mutant: the mean square with the rows
        return torch.cat([net.makes[0].weight.flatten(1), net.norms[0].weight[:, None]], 1).detach().square().mean(1)

    before, other = state(), everything()
    with torch.no_grad():
        net.makes[0].weight.mul_(torch.linspace(20.0, 40.0, 5)[:, None, None, None])
    for was, now in zip(before, state(), strict=True):
        torch.testing.assert_close(now, was, rtol=1e-3, atol=1e-3)
    assert bool((everything() > 100 * other).all())


def cost(net: Normed, d: float | None = None) -> Tensor:
    """Return sum d_g omega(r_g) of batch norm's weights and biases, for their number d_g = 2 or another ``d``."""
    size = torch.stack([net.norms[0].weight, net.norms[0].bias]).square().mean(0).sqrt()
    return (2 if d is None else d) * LOG_SUM.omega(size).sum()


def test_the_gradient_is_that_of_the_penalty_with_the_number_of_carriers() -> None:
    net, method = Normed(), ReweightedGradient(LOG_SUM)
    run = run_of(net, images(), method)
    optimizer = torch.optim.SGD(net.parameters(), 1.0)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    run.support.weights.attach(net, [optimizer], lambda name: net.get_parameter(name).detach())
    members = [(name, p, optimizer.param_groups[0]) for name, p in net.named_parameters() if name in weights(run)]
    run.before_optimizer(method, Step(optimizer, members, LAM, run.engine))
    norm = net.norms[0]
    wanted = torch.autograd.grad(LAM * cost(net), [norm.weight, norm.bias])
    for found, exact in zip((norm.weight.grad, norm.bias.grad), wanted, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-7)
    assert not any(p.grad.any() for p in (net.makes[0].weight, net.reads.weight))
    assert run.support.penalty_value(weights(run)) == pytest.approx(LAM * float(cost(net).detach()), rel=1e-6)
    removed = 2 + net.makes[0].weight[0].numel() + net.reads.weight[:, 0].numel()
    other = torch.autograd.grad(LAM * cost(net, removed), norm.weight)[0]  # the mutant: all weights that vanish
    assert not torch.allclose(norm.weight.grad, other, rtol=0.5)


def test_the_eta_trick_and_the_mask_are_of_the_same_number() -> None:
    """(sum w^2 / eta + d f(eta)) / 2 is the penalty at d = carriers alone, and 1 / (1 + lam / eta) the mask's keep probability."""
    net = Normed()
    run = run_of(net, images(), ReweightedGradient(LOG_SUM))
    norm = net.norms[0]
    eta = run.support.eta("norms.0.weight", norm.weight.detach())
    assert torch.equal(eta, run.support.eta("norms.0.bias", norm.bias.detach()))  # one for both
    squares = (norm.weight**2 + norm.bias**2).detach()
    for d, holds in ((2, True), (2 + 27 + 18, False)):
        trick = (squares / eta + d * LOG_SUM.dual(eta)).sum() / 2
        assert torch.isclose(trick, cost(net, d).detach(), rtol=1e-5) == holds
    alpha = run.support.keep_probability("norms.0.weight")
    torch.testing.assert_close(alpha, 1 / (1 + LAM / eta))
