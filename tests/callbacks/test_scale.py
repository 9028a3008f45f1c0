"""Scale of the curvature estimates, and the distribution of the noise in the forward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from toys import Repeated, Spy, Toy, data, trainer, weights

from lightning_sparse import mask_rules, noise, penalties
from lightning_sparse.callbacks import AdaptiveMask
from lightning_sparse.curvature import EmpiricalFisher, SampledFisher, calibrated
from lightning_sparse.schedules import LinearWarmup

LOG_SUM = penalties.LogSum(eps=2.0)
KINDS = [noise.Gaussian(), noise.Gaussian(local=True), noise.ScaledBernoulli()]
every_noise = pytest.mark.parametrize("kind", KINDS, ids=["on weights", "on outputs", "Bernoulli"])


def sgd(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr)


class Silent(noise.Noise):
    """Noise whose masks are all ones."""

    def sample(self, alpha, generator=None):
        return torch.ones_like(alpha)


class Split(nn.Module):
    """A network that calls its layer ``calls`` times per forward."""

    def __init__(self, calls):
        super().__init__()
        self.layer, self.calls = nn.Linear(8, 3), calls

    def forward(self, x):
        return sum(self.layer(x) for _ in range(self.calls)) * (2 / self.calls)


def estimate(network, batch, count=1, **options):
    """Return H of the first weight after ``count`` equal batches."""
    found, callback = [], AdaptiveMask(LOG_SUM, 0.1, noise=Silent(), curvature=EmpiricalFisher(every=1, decay=0.5))
    name = next(name for name, _ in Toy(network).named_parameters())
    spy = Spy(lambda moment, module: found.append(callback.curvature.estimate(name).clone()) if moment == "batch end" else None)
    trainer(callback, spy, epochs=1, **options).fit(Toy(copy.deepcopy(network), sgd(0.0)), Repeated(batch, count))
    assert found[-1].max() > 0
    return found[-1]


@pytest.mark.parametrize("calls", [1, 2], ids=["at the layer", "from the gradient"])
def test_accumulation_leaves_the_curvature_as_it_is(calls):
    network, batch = Split(calls), next(iter(data()))
    alone, windows = estimate(network, batch, 4), estimate(network, batch, 4, accumulate_grad_batches=2)
    torch.testing.assert_close(windows, alone, rtol=1e-4, atol=1e-9)


def test_a_layer_called_twice_has_the_curvature_of_the_whole():
    whole, halves = Split(1), Split(2)
    halves.load_state_dict(whole.state_dict())
    batch = (torch.randn(1, 8), torch.tensor([1]))
    torch.testing.assert_close(estimate(halves, batch), estimate(whole, batch), rtol=0.05, atol=1e-9)


def test_a_sampled_fisher_without_output_asks_for_a_module_name():
    class Inner(Toy):
        def training_step(self, batch, index):
            return self.loss(self.network(batch[0]), batch[1])

    with pytest.raises(RuntimeError, match="output="):
        trainer(AdaptiveMask(LOG_SUM, 0.1, curvature=SampledFisher(output=""))).fit(Inner(), data())
    trainer(AdaptiveMask(LOG_SUM, 0.1, curvature=SampledFisher(output="network"))).fit(Inner(), data())


def listen(network, callback, x, count=1):
    """Return the outputs of ``count`` training forwards at learning rate 0, and a copy of the network without noise."""
    outputs = []

    class Listening(Toy):
        def training_step(self, batch, index):
            outputs.append(self(batch[0]))
            return 0 * outputs[-1].sum()

    twin = copy.deepcopy(network)
    trainer(callback, epochs=1).fit(Listening(network, sgd(0.0)), Repeated((x, x), count))
    return [output.detach() for output in outputs], twin


@every_noise
def test_a_warm_up_begins_without_noise(kind):
    callback = AdaptiveMask(LOG_SUM, LinearWarmup(5.0, 1.0), noise=kind, curvature=None)
    (first, *_, last), twin = listen(nn.Linear(8, 3), callback, torch.ones(4, 8), 4)
    torch.testing.assert_close(first, twin(torch.ones(4, 8)), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(first, last, atol=1e-3)


@every_noise
def test_alpha_min_bounds_the_variance_of_the_masks(kind):
    torch.manual_seed(0)
    network, x = nn.Linear(4, 8000, bias=False), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    network.weight.data.fill_(1e-3)  # alpha is 2e-4 without calibration
    (output,), _ = listen(network, AdaptiveMask(LOG_SUM, 10.0, noise=kind, curvature=None, alpha_min=0.25), x)
    assert output.var().item() == pytest.approx((1 / 0.25 - 1) * 30e-6, rel=0.15)
    assert output.mean().item() == pytest.approx(10e-3, rel=0.05)


def test_the_ceiling_bounds_lam_over_the_curvature():
    found, loader, eta = [], data(), LOG_SUM.eta_hat
    loader.dataset.tensors[0][:, 2] = 0.0  # without curvature
    callback = AdaptiveMask(LOG_SUM, 0.3, noise=Silent(), curvature=EmpiricalFisher(every=1), ceiling=4.0, remainder=False)
    spy = Spy(lambda moment, module: found.append(callback.keep_probability("network.weight")) if moment == "batch end" else None)
    module = Toy(nn.Linear(8, 3), sgd(0.0))
    w = module.network.weight.detach().clone()
    trainer(callback, spy, epochs=1).fit(module, loader)
    torch.testing.assert_close(found[-1][:, 2], 1 / (1 + 4.0 / eta(w[:, 2])))
    h = torch.tensor([0.0, 0.01, 0.075, 1.0])
    torch.testing.assert_close(0.3 / calibrated(torch.ones(4), h, 0.3, 4.0), torch.tensor([4.0, 4.0, 4.0, 0.3]))


@every_noise
def test_the_weights_that_top_k_drops_are_absent(kind):
    network, x = nn.Linear(8, 4), torch.randn(5, 8)
    (output,), twin = listen(network, AdaptiveMask(mask_rules.TopK(0.25), noise=kind, curvature=None), x)
    bound = twin.weight.detach().abs().flatten().sort(descending=True).values[8]
    kept = twin.weight * (twin.weight.abs() > bound)
    torch.testing.assert_close(output, functional.linear(x, kept, twin.bias), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_a_convolutions_output_noise_has_the_variance_of_its_weights_noise(mode):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode), torch.randn(1, 2, 4, 4)
    callback = AdaptiveMask(LOG_SUM, 0.5, noise=noise.Gaussian(local=True), curvature=None)
    (output,), twin = listen(layer, callback, x.expand(4000, -1, -1, -1))
    around = functional.pad(x, (1, 1, 1, 1), mode="constant" if mode == "zeros" else mode)
    spread = twin.weight**2 * 0.5 / LOG_SUM.eta_hat(twin.weight)
    expected = functional.conv2d(around**2, spread)[0].detach()
    torch.testing.assert_close(output.var(0), expected, rtol=0.12, atol=0)
    plain = functional.conv2d(around, twin.weight, twin.bias)[0].detach()
    assert ((output.mean(0) - plain).abs() < 4.5 * (expected / 4000).sqrt()).all()


def test_bernoulli_masks_have_mean_one_in_sixteen_bits():
    mask = noise.ScaledBernoulli().sample(torch.full((200_000,), 0.01, dtype=torch.bfloat16), torch.Generator().manual_seed(0))
    assert mask.dtype == torch.bfloat16
    assert mask.double().mean().item() == pytest.approx(1, rel=0.05)


class Recomputed(nn.Module):
    """A body that is called twice, optionally with activation checkpointing."""

    def __init__(self, again):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 3)
        self.run = (lambda part, x: checkpoint(part, x, use_reentrant=False)) if again else (lambda part, x: part(x))
        self.parts = [self.body] * 2

    def forward(self, x):
        for part in self.parts:
            x = self.run(part, x)
        return self.head(x)


@pytest.mark.parametrize("curvature", [None, EmpiricalFisher(every=2)], ids=["plain", "calibrated"])
def test_a_recomputed_forward_draws_the_noise_of_the_first(curvature):
    ends = []
    for again in (False, True):
        torch.manual_seed(0)
        module = Toy(Recomputed(again), sgd(0.1))
        callback = AdaptiveMask(LOG_SUM, 0.3, noise=noise.Gaussian(local=True), curvature=curvature)
        trainer(callback, epochs=1).fit(module, data())
        ends.append(weights(module))
    for name, w in ends[0].items():
        torch.testing.assert_close(ends[1][name], w, rtol=1e-5, atol=1e-6, msg=name)
