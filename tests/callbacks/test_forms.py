"""Results of each callback against autograd, enumeration of masks and a hand-written loop."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from toys import Repeated, Spy, Toy, data, trainer, weights

from lightning_sparse import duality, mask_rules, noise, penalties
from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, ReweightedPenalty

LOG_SUM = penalties.LogSum(eps=2.0)
SGD = {"optimizer": lambda p: torch.optim.SGD(p, 0.1)}


class PenaltyInLoss(Toy):
    """Reference: lam * Omega in the loss, differentiated by autograd."""

    lam = 1e-2

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        return loss + self.lam * sum(LOG_SUM.omega(p).sum() for p in self.network.parameters() if p.dim() == 2)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_gradient_equals_the_loss_term(accumulate):
    plain, reference = Toy(**SGD), PenaltyInLoss(**SGD)
    trainer(ReweightedPenalty(LOG_SUM, lam=1e-2), accumulate_grad_batches=accumulate).fit(plain, data())
    trainer(accumulate_grad_batches=accumulate).fit(reference, data())
    for (name, w), expected in zip(weights(plain).items(), weights(reference).values(), strict=True):
        kept = w != 0  # the end of fit set small weights to zero
        torch.testing.assert_close(w[kept], expected[kept], rtol=1e-4, atol=1e-6, msg=name)
        assert (expected[~kept].abs() < 2e-2).all()


def reference_prox(module, loader, epochs, lam, betas=(0.9, 0.999), eps=1e-8, lr=1e-2):
    """Compute AdaProx in Adam's metric from the formulas."""
    parameters = list(module.parameters())
    first, second = [torch.zeros_like(p) for p in parameters], [torch.zeros_like(p) for p in parameters]
    for step, (x, y) in enumerate(itertools.chain(*[loader] * epochs), start=1):
        grads = torch.autograd.grad(module.loss(module(x), y), parameters)
        for p, g, m, v in zip(parameters, grads, first, second, strict=True):
            m.mul_(betas[0]).add_(g, alpha=1 - betas[0])
            v.mul_(betas[1]).add_(g * g, alpha=1 - betas[1])
            rho = lr / ((v / (1 - betas[1] ** step)).sqrt() + eps)
            p.data -= rho * m / (1 - betas[0] ** step)
            if p.dim() == 2:
                p.data = torch.where(p == 0, p, p / (1 + rho * lam / (p.abs() * (p.abs() + 2))))


def test_prox_in_adams_metric_follows_its_formula():
    module, reference = Toy(), Toy()
    trainer(AdaptiveProx(LOG_SUM, lam=1e-3)).fit(module, data())
    reference_prox(reference, data(), epochs=2, lam=1e-3)
    for w, expected in zip(weights(module).values(), weights(reference).values(), strict=True):
        kept = w != 0
        torch.testing.assert_close(w[kept], expected[kept], rtol=1e-3, atol=1e-5)
        assert kept.float().mean() > 0.5


def test_prox_runs_once_an_accumulation_window_and_not_in_validation():
    calls = []

    callback = AdaptiveProx(LOG_SUM, lam=1e-3)
    callback.method.after_optimizer = lambda step: calls.append(callback.step)
    trainer(callback, accumulate_grad_batches=2, limit_val_batches=3).fit(Toy(), data(), data())
    assert calls == [0, 1, 2, 3]  # 4 batches per epoch, 2 epochs, accumulation over 2


class EveryMask(noise.Noise):
    """Noise that enumerates all masks of a weight; records the probability of the last one."""

    def __init__(self, index):
        self.index, self.chance = index, 0.0

    def sample(self, alpha, generator=None):
        bits = (self.index // 2 ** torch.arange(alpha.numel()) % 2).reshape(alpha.shape).bool()
        self.chance = float(torch.where(bits, alpha, 1 - alpha).prod())
        return torch.where(bits, 1 / alpha, torch.zeros_like(alpha))


def one_step(module, callback, batch):
    """Return the change of the weights in one SGD step with rate 1."""
    before, after = module.network.weight.detach().clone(), []
    spy = Spy(lambda moment, module: after.append(module.network.weight.detach().clone()))
    trainer(callback, spy, max_steps=1).fit(module, Repeated(batch))
    return before - after[-1]


def test_expected_gradient_of_the_mask_form_is_the_penalty_forms():
    """For a linear model with unit curvature, the mean of the masked gradient over all masks is exact."""
    torch.manual_seed(0)
    x = torch.linalg.qr(torch.randn(12, 3, dtype=torch.float64))[0] * 12**0.5  # x^T x / n = I
    batch, lam = (x, torch.randn(12, 1, dtype=torch.float64)), 0.3

    def toy():
        network = nn.Linear(3, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            network.weight.copy_(torch.tensor([[0.5, -1.0, 2.0]]))
        half_squares = lambda prediction, y: ((prediction - y) ** 2).mean() / 2  # noqa: E731
        return Toy(network, optimizer=lambda p: torch.optim.SGD(p, 1.0), loss=half_squares)

    total = torch.zeros(1, 3, dtype=torch.float64)
    for index in range(8):
        every = EveryMask(index)
        total += one_step(toy(), AdaptiveMask(LOG_SUM, lam, noise=every, curvature=None), batch) * every.chance
    torch.testing.assert_close(total, one_step(toy(), ReweightedPenalty(LOG_SUM, lam), batch), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("local", "rows", "batches"), [(False, 1, 800), (True, 1000, 2)])
def test_gaussian_noise_has_the_promised_variance(local, rows, batches):
    """Outputs of a layer with noise per batch or per row have mean W x and variance (W^2 lam / eta)(x^2)."""
    torch.manual_seed(0)
    outputs, lam = [], 0.5

    class Listening(Toy):
        def training_step(self, batch, index):
            outputs.append(self(batch[0]).detach().clone())
            return 0 * self(batch[0]).sum()

    network = nn.Linear(4, 5)
    x = torch.randn(1, 4)
    many = x.expand(rows, 4)
    expected = (network.weight**2 * lam / LOG_SUM.eta_hat(network.weight)) @ x[0] ** 2
    mean = network(x)[0].detach()
    callback = AdaptiveMask(LOG_SUM, lam, noise=noise.Gaussian(local=local), curvature=None)
    trainer(callback, epochs=1).fit(Listening(network, optimizer=lambda p: torch.optim.SGD(p, 0.0)), Repeated((many, many), batches))
    drawn = torch.cat(outputs)
    torch.testing.assert_close(drawn.var(0), expected.detach(), rtol=0.2, atol=0)
    assert ((drawn.mean(0) - mean).abs() < 4 * (expected / len(drawn)).sqrt()).all()


def test_bernoulli_noise_has_no_local_reparametrisation():
    with pytest.raises(TypeError, match="local"):
        noise.ScaledBernoulli(local=True)


@pytest.mark.parametrize("form", [AdaptiveMask, ReweightedPenalty, AdaptiveProx])
def test_conversion_carries_everything_shared(form):
    shared = {"select": ["network.0.*"], "tol": 0.1, "freeze": 0.25, "threshold": 1e-3, "gap_samples": 2}
    callback = form(LOG_SUM, lam=2e-3, **shared)
    for other in (callback.to_mask(), callback.to_penalty(), callback.to_prox()):
        assert (other.penalty, other.lam) == (LOG_SUM, 2e-3)
        assert {name: getattr(other, name) for name in shared} == shared


def test_a_rule_brings_its_own_strength():
    rule = duality.to_mask_rule(LOG_SUM, lam=7e-3)
    assert ReweightedPenalty(rule).lam == 7e-3
    assert ReweightedPenalty(rule).penalty is LOG_SUM
    assert ReweightedPenalty(rule, lam=1e-3).to_mask().lam == 1e-3


def test_top_k_trains_and_keeps_its_share():
    """Iterative hard thresholding: dropped weights are absent from the forward, and the density is constant."""
    seen = []

    class Listening(Toy):
        def training_step(self, batch, index):
            seen.append(float((self.network[0].weight == 0).float().mean()))
            return super().training_step(batch, index)

    module = Listening()
    trainer(AdaptiveMask(mask_rules.TopK(density=0.25), curvature=None), epochs=3).fit(module, data())
    assert seen == [0.75] * 12
    assert (module.network[0].weight == 0).float().mean().item() == 0.75
