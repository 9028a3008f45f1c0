"""Methods with noise, learned parameters or pruning in a plain torch loop; each step against a hand-written one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sparse import duality, penalties
from lightning_sparse.gates import Gate
from lightning_sparse.mask_rules import TopK
from lightning_sparse.methods import EtaTrick, HardConcrete, MagnitudePruning, Mask, Method, Run, Step, VariationalDropout
from lightning_sparse.noise import Gaussian, ScaledBernoulli
from lightning_sparse.penalties import LogSum, Scaled
from lightning_sparse.schedules import Constant, Cubic, Schedule
from lightning_sparse.step import Strength

RATE = 0.05
one = lambda: 1.0  # noqa: E731 - the loss is scaled by nothing


class Loop:
    """Train one weight matrix with two relevant inputs of ten, by SGD and a method."""

    def __init__(self, method: Method, schedule: Schedule, optimizer: Callable[[Any], torch.optim.Optimizer] | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(64, 10, generator=generator, dtype=torch.float64)
        self.y = self.x[:, :1] - 0.5 * self.x[:, 1:2]
        torch.manual_seed(1)
        self.net, self.method = nn.Linear(10, 1, bias=False).double(), method
        self.optimizer = optimizer(self.net.parameters()) if optimizer else torch.optim.SGD(self.net.parameters(), RATE)
        self.run = Run.alone(method, {"weight": self.net.weight}, Strength(schedule), info=lambda text: None)
        method.reset(self.run)
        method.prepare()
        self.run.weights.attach(self.net, [self.optimizer], self.run.support.thresholded)
        method.attach(self.net, [self.optimizer])
        method.begin()

    def loss(self, w: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.x @ w.t(), self.y)

    def step(self) -> tuple[Tensor, Tensor, Tensor]:
        """Take one step; return the live weights before it, the weights in the forward, and the live weights after it."""
        before = self.run.weights.live("weight").clone()
        self.optimizer.zero_grad()
        self.method.before_forward((self.x, self.y))
        used = self.net.weight.detach().clone()
        loss = nn.functional.mse_loss(self.net(self.x), self.y)
        self.method.before_backward(loss, one)
        loss.backward()
        self.method.after_backward(one)
        step = Step(self.optimizer, self.run.weights.members(self.optimizer), self.run.strength.lam, self.run.engine, self.run.weights.live)
        self.method.before_optimizer(step)
        self.optimizer.step()
        self.method.after_optimizer(step)
        self.run.support.hold_(self.optimizer)
        self.run.strength.step += 1
        self.method.progress()
        self.method.after_batch()
        return before, used, self.run.weights.live("weight").clone()

    def train(self, steps: int) -> Tensor:
        """Take many steps; return the zero mask."""
        self.run.strength.total = steps
        for _ in range(steps):
            self.step()
        return self.run.support.zeros("weight")[0]

    def gradient(self, w: Tensor) -> Tensor:
        leaf = w.clone().requires_grad_()
        return torch.autograd.grad(self.loss(leaf), leaf)[0]


def variational(noise: str) -> Callable[[], Method]:
    divergence, weight = penalties.VariationalDropout("log_uniform"), 0.05
    return lambda: VariationalDropout(Scaled(divergence, weight**0.5), divergence, noise, None, -5.0)


def hard_concrete() -> Method:
    return HardConcrete(Scaled(penalties.HardConcrete(), 0.1**0.5), Gate(), 0.05, 2.0)


def pruning() -> Method:
    return MagnitudePruning(TopK(0.2).to_penalty(), 0.8, begin=0.0, every=5, scope="global")


TRAINED: dict[str, tuple[Callable[[], Method], Schedule, int]] = {
    "mask": (lambda: Mask(LogSum(0.1), Gaussian(), None, 10.0, 1e-3), Constant(0.05), 600),
    "eta-trick": (lambda: EtaTrick(LogSum(0.5), 0.05, 0.05), Constant(0.05), 800),
    "variational, weight": (variational("weight"), Constant(0.05), 1500),
    "variational, local": (variational("local"), Constant(0.05), 1500),
    "variational, additive": (variational("additive"), Constant(0.05), 1500),
    "hard concrete": (hard_concrete, Constant(0.1), 1500),
    "pruning": (pruning, Cubic(0.8, 0.0, 0.75), 200),
}


QUICK = ("eta-trick", "pruning")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in TRAINED])
def test_it_trains_the_weights_that_matter_and_zeroes_the_others_without_lightning(name: str) -> None:
    make, schedule, steps = TRAINED[name]
    loop = Loop(make(), schedule, lambda p: torch.optim.Adam(p, 0.02))
    loop.run.support.tol = 0.15  # because estimates are noisy
    zeros = loop.train(steps)
    assert zeros.tolist() == [False, False, *[True] * 8]
    kept = loop.run.support.thresholded("weight")
    assert float(loop.loss(kept)) < 0.1


def test_a_mask_multiplies_the_weights_and_their_gradient() -> None:
    penalty, lam = LogSum(0.5), 0.3
    loop = Loop(Mask(penalty, ScaledBernoulli(), None, 10.0, 1e-3), Constant(lam))
    kept = []
    for _ in range(40):
        before, used, after = loop.step()
        mask = used / before
        alpha = duality.keep_probability(penalty.eta_hat(before), lam)
        torch.testing.assert_close(mask, torch.where(mask > 0, 1 / alpha, 0.0), rtol=1e-3, atol=1e-9)  # drawn in steps of 1/65536
        torch.testing.assert_close(after, before - RATE * mask * loop.gradient(used))
        kept.append((mask > 0).double() - alpha)
    assert abs(float(torch.cat(kept).mean())) < 0.06  # a mask is kept with probability alpha


def test_the_eta_trick_descends_on_weights_and_log_eta() -> None:
    penalty, lam = LogSum(0.5), 0.2
    method = EtaTrick(penalty, lam, keep_start=0.7)
    loop = Loop(method, Constant(lam))
    for _ in range(5):
        log_eta = method.learned.values["weight"].detach().clone()
        before, used, after = loop.step()
        w, theta = before.clone().requires_grad_(), log_eta.clone().requires_grad_()
        value = loop.loss(w) + lam / 2 * (w * w / theta.exp() + penalty.dual(theta.exp())).sum()
        in_w, in_theta = torch.autograd.grad(value, (w, theta))
        assert torch.equal(used, before)
        torch.testing.assert_close(after, before - RATE * in_w)
        torch.testing.assert_close(method.learned.values["weight"].detach(), log_eta - RATE * in_theta)


def test_variational_dropout_descends_on_loss_and_divergence_under_its_own_draw() -> None:
    divergence, lam = penalties.VariationalDropout("empirical_bayes"), 0.2
    method = VariationalDropout(Scaled(divergence, lam**0.5), divergence, "weight", None, -1.0)
    loop = Loop(method, Constant(lam))
    for _ in range(5):
        log_eta = method.learned.values["weight"].detach().clone()
        before, used, after = loop.step()
        epsilon = (used / before - 1) * (log_eta / 2).exp()
        w, theta = before.clone().requires_grad_(), log_eta.clone().requires_grad_()
        value = loop.loss(w * (1 + epsilon * (-theta / 2).exp())) + lam / 2 * divergence.dual(theta.exp()).sum()
        in_w, in_theta = torch.autograd.grad(value, (w, theta))
        torch.testing.assert_close(after, before - RATE * in_w)
        torch.testing.assert_close(method.learned.values["weight"].detach(), log_eta - RATE * in_theta, rtol=1e-5, atol=1e-7)


def test_pruning_removes_the_smallest_weights_for_good() -> None:
    loop = Loop(pruning(), Cubic(0.8, 0.0, 0.75))
    loop.run.strength.total = 20
    ramp, gone = Cubic(0.8, 0.0, 0.75), torch.zeros(10, dtype=torch.bool)
    for number in range(1, 21):
        _, _, after = loop.step()
        if number % 5 == 0:
            smallest = after[0].abs().argsort()[: round(10 * ramp(number, 20))]
            assert bool((after[0][smallest] == 0).all())
        assert bool((after[0][gone] == 0).all())
        gone = after[0] == 0
    assert int(gone.sum()) == 8
