"""VariationalDropout: gradients against autograd of hand-written forwards, minima against a grid search of the equivalent penalty."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from toys import Repeated, Spy, Toy, trainer

from lightning_sparse import penalties
from lightning_sparse.callbacks import VariationalDropout
from lightning_sparse.schedules import LinearWarmup

KL = 0.3
LAYERS = {
    "Linear": (lambda: nn.Linear(4, 3, bias=False), (5, 4), functional.linear),
    "Conv1d": (lambda: nn.Conv1d(2, 3, 2, bias=False), (5, 2, 6), functional.conv1d),
    "Conv2d": (lambda: nn.Conv2d(2, 3, 2, bias=False), (5, 2, 4, 4), functional.conv2d),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2, bias=False), (5, 2, 3, 3, 3), functional.conv3d),
}


class Recording(VariationalDropout):
    """VariationalDropout that records the noise on outputs."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.drawn, self.method.draw_outputs = [], partial(self.note, self.method.draw_outputs)

    def note(self, draw, name, layer, x, generator):
        drawn = draw(name, layer, x, generator)
        self.drawn.append((x.detach(), drawn.detach()))
        return drawn


def loss(prediction, y):
    first = prediction[0] if isinstance(prediction, tuple) else prediction
    return (first.flatten(1) @ y[: first.flatten(1).shape[1]]).square().mean()


def recorded(network, shape, noise):
    """Return the last batch's live weights, learned parameters, noisy weights, and gradients after backward and before the step."""
    generator, seen = torch.Generator().manual_seed(3), {}
    batch = (torch.randn(shape, dtype=torch.float64, generator=generator), torch.randn(200, 1, dtype=torch.float64, generator=generator))
    callback = Recording(KL, "empirical_bayes", select=["*weight*"], noise=noise, log_start=-0.7)

    def look(moment, module):
        if moment == "before backward":
            seen["theta"] = {n: p.detach().clone() for n, p in callback.learned.items()}
            seen["noisy"] = {n: p.detach().clone() for n, p in callback.parameters.items()}
        if moment == "after backward":
            seen["live"] = {n: p.detach().clone() for n, p in callback.parameters.items()}
        if moment in ("after backward", "before step"):
            own = {n: p.grad.clone() for n, p in callback.learned.items() if p.grad is not None}
            seen[moment] = ({n: p.grad.clone() for n, p in callback.parameters.items()}, own)

    module = Toy(network.double(), lambda p: torch.optim.Adam(p, 0.1), loss)
    trainer(callback, Spy(look), epochs=1, precision=64).fit(module, Repeated(batch, 3))
    seen["network"] = network
    return callback, batch, seen


def divergence(w, theta, additive):
    """Compute kl_weight * sum log(1 + eta) / 2."""
    eta = w**2 * (-2 * theta).exp() if additive else theta.exp()
    return KL / 2 * (1 + eta).log().sum()


def compare(seen, name, total, w, theta):
    """Compare the gradients of a weight and of its learned parameter before the step."""
    in_w, in_theta = torch.autograd.grad(total, [w, theta], retain_graph=True)
    torch.testing.assert_close(seen["before step"][0][name], in_w, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(seen["before step"][1][name], in_theta, rtol=1e-6, atol=1e-9)
    assert in_theta.abs().min() > 0


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("noise", ["local", "additive"])
def test_gradients_with_noise_on_outputs_are_those_of_a_forward_written_anew(kind, noise):
    make, shape, run = LAYERS[kind]
    torch.manual_seed(1)
    callback, (x, y), seen = recorded(nn.Sequential(make()), shape, noise)
    assert torch.equal(seen["noisy"]["network.0.weight"], seen["live"]["network.0.weight"])
    assert len(callback.drawn) == 3
    w, theta = (seen[part]["network.0.weight"].clone().requires_grad_() for part in ("live", "theta"))
    spread = (2 * theta).exp() if noise == "additive" else w**2 * (-theta).exp()
    deviation = run(x**2, spread).sqrt()
    epsilon = callback.drawn[-1][1] / deviation.detach()
    assert 0.5 < float(epsilon.std()) < 1.7
    total = loss(run(x, w) + epsilon * deviation, y) + divergence(w, theta, noise == "additive")
    compare(seen, "network.0.weight", total, w, theta)


class Attention(nn.Module):
    """Attention that uses its projections' weights without their forwards."""

    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, bias=False, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x)


UNSEEN = {
    "Linear": (lambda: nn.Linear(4, 3, bias=False), (5, 4), "weight"),
    "Conv2d": (lambda: nn.Conv2d(2, 3, 2, bias=False), (5, 2, 4, 4), "weight"),
    "MultiheadAttention": (Attention, (5, 3, 4), "additive"),
    "LSTM": (lambda: nn.LSTM(4, 3, bias=False, batch_first=True), (5, 3, 4), "additive"),
    "LSTM, multiplicative": (lambda: nn.LSTM(4, 3, bias=False, batch_first=True), (5, 3, 4), "local"),
}


@pytest.mark.parametrize("kind", UNSEEN)
def test_gradients_with_noise_on_weights_are_those_of_a_forward_written_anew(kind):
    """Includes layers whose forward is bypassed, for every ``noise``."""
    make, shape, noise = UNSEEN[kind]
    torch.manual_seed(1)
    network = make()
    callback, (x, y), seen = recorded(network, shape, noise)
    assert not callback.drawn
    names = list(seen["live"])
    w = {n: seen["live"][n].clone().requires_grad_() for n in names}
    theta = {n: seen["theta"][n].clone().requires_grad_() for n in names}
    spread = {n: theta[n].exp() if noise == "additive" else w[n] * (-theta[n] / 2).exp() for n in names}
    epsilon = {n: ((seen["noisy"][n] - w[n]) / spread[n]).detach() for n in names}
    drawn = torch.cat([one.flatten() for one in epsilon.values()])
    assert drawn.abs().min() > 0
    assert 0.5 < float(drawn.std()) < 1.7
    noisy = {n.removeprefix("network."): w[n] + epsilon[n] * spread[n] for n in names}
    total = loss(functional_call(seen["network"], noisy, (x,)), y)
    total = total + sum(divergence(w[n], theta[n], noise == "additive") for n in names)
    for name in names:
        compare(seen, name, total, w[name], theta[name])


def penalised(a, kl):
    """Minimise (w - a)^2 / 2 + kl Omega(w / sqrt(kl)) by grid search, with Omega of the empirical-Bayes prior."""
    grid = torch.linspace(-0.5, 3, 70_001, dtype=torch.float64)[:, None]
    t = torch.asinh(grid.abs() / math.sqrt(kl) / 2)
    return grid[((grid - a) ** 2 / 2 + kl * (t + (1 - torch.exp(-2 * t)) / 2)).argmin(0)][:, 0]


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["weight", "local", "additive"])
def test_training_ends_at_the_minimum_of_the_penalty_that_it_amounts_to(noise):
    """The mean over 400 independent replicas of four separable problems of unit curvature estimates the expectation."""
    kl, a = 0.2, torch.tensor([0.1, 0.4, 1.0, 2.5], dtype=torch.float64)
    network, live = nn.Linear(4, 400, bias=False, dtype=torch.float64), []
    network.weight.data = a.expand(400, 4).clone()
    bowl = lambda prediction, y: ((prediction - y) ** 2).sum() / 2  # noqa: E731
    module = Toy(network, lambda p: torch.optim.Adam(p, 0.03), bowl, decay=True)
    callback = VariationalDropout(kl, "empirical_bayes", noise=noise, learned_lr=0.06, log_start=-1.0)
    look = lambda moment, module: live.append(module.network.weight.detach().clone()) if moment == "batch end" else None  # noqa: E731
    batch = (torch.eye(4, dtype=torch.float64), a[:, None].expand(4, 400))
    trainer(callback, Spy(look), epochs=1, precision=64).fit(module, Repeated(batch, 500))
    torch.testing.assert_close(live[-1].mean(0), penalised(a, kl), rtol=0.05, atol=0.08)
    assert (live[-1].mean(0) - a).abs().max() > 0.2
    assert module.network.weight[:, 0].eq(0).double().mean() > 0.5 > module.network.weight[:, 3].eq(0).double().mean()


@pytest.mark.parametrize("noise", ["weight", "additive"])
def test_the_divergence_warms_up(noise):
    """The divergence's part of the learned parameter's gradient follows the schedule."""
    paid, callback = [], VariationalDropout(LinearWarmup(KL, 0.5), "empirical_bayes", noise=noise, log_start=-1.0)
    kept = {}

    def look(moment, module):
        if moment == "after backward":
            kept["before"] = {n: 0 if p.grad is None else p.grad.clone() for n, p in callback.learned.items()}
        if moment == "before step":
            w, theta = module.network.weight.detach(), callback.learned["network.weight"].detach().clone().requires_grad_()
            (full,) = torch.autograd.grad(divergence(w, theta, noise == "additive"), theta)
            share = (callback.learned["network.weight"].grad - kept["before"]["network.weight"]) / full
            assert float(share.std()) < 1e-3
            paid.append(float(share.mean()))

    module = Toy(nn.Linear(4, 1), lambda p: torch.optim.SGD(p, 0.01), functional.mse_loss)
    trainer(callback, Spy(look), epochs=1).fit(module, Repeated((torch.randn(6, 4), torch.randn(6, 1)), 8))
    assert paid == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1, 1, 1], abs=1e-3)


@pytest.mark.parametrize("noise", ["weight", "local", "additive"])
@pytest.mark.parametrize("tol", [0.05, 0.5])
def test_a_weight_much_smaller_than_its_noise_is_zero(noise, tol):
    callback = VariationalDropout(KL, noise=noise, tol=tol)
    w = torch.tensor([0.5, 0.5, -0.5, 0.0])
    eta = tol / (1 - tol) * torch.tensor([0.99, 1.01, 0.99, 1.01])  # alpha = 1 / (1 + 1 / eta) compared with tol
    callback.learned["w"] = nn.Parameter((w.abs() / eta.sqrt()).clamp(min=1e-3).log() if noise == "additive" else eta.log())
    assert callback.zeros("w", w).tolist() == [True, False, True, True]


@pytest.mark.parametrize("prior", ["log_uniform", "molchanov", "empirical_bayes"])
def test_conversions_carry_the_scaled_prior_and_the_weight(prior):
    callback = VariationalDropout(0.04, prior, select=["network.*"], tol=0.1, freeze=0.2, threshold=1e-3)
    for other in (callback.to_penalty(), callback.to_mask(), callback.to_prox()):
        assert other.penalty == penalties.Scaled(penalties.VariationalDropout(prior), 0.2)
        assert (other.lam, other.select, other.tol, other.freeze, other.threshold) == (0.04, ["network.*"], 0.1, 0.2, 1e-3)
    assert callback.to_penalty(lam=0.5).lam == 0.5


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"noise": "locl"}, "noise must be 'weight', 'local' or 'additive', got 'locl'; closest: 'local'"),
        ({"prior": "log_unifrom"}, "prior must be one of .*, got 'log_unifrom'; closest: 'log_uniform'"),
        ({"log_start": 99.0}, "log_start must lie in"),
        ({"learned_lr": -1.0}, "learned_lr must be"),
    ],
)
def test_unknown_words_and_numbers_out_of_range_are_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        VariationalDropout(KL, **wrong)


@pytest.mark.parametrize("noise", ["weight", "local"])
def test_far_log_eta_gives_finite_noise(noise):
    """log eta of a pruned weight may drift far; its noise must not become inf * 0."""
    callback = VariationalDropout(KL, "empirical_bayes", noise=noise)
    layer, theta = nn.Linear(2, 2), torch.full((2, 2), -500.0, requires_grad=True)
    layer.weight.data.zero_()
    assert torch.isfinite(callback.method.kind.output_noise(layer, torch.ones(3, 2), theta)).all()
    assert torch.isfinite(layer.weight * callback.method.kind.deviation(layer.weight, theta)).all()
