"""keep_zeros, the zero region, schedules, freeze and metric, each against an independent result."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from toys import Repeated, Spy, Toy, data, trainer, weights

from lightning_sparse import noise, penalties, proximal
from lightning_sparse import optimizer as steps_of
from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, ReweightedPenalty
from lightning_sparse.schedules import LinearWarmup

LOG_SUM = penalties.LogSum(eps=2.0)
FORMS = {
    "penalty": ReweightedPenalty,
    "prox": AdaptiveProx,
    "exact prox": partial(AdaptiveProx, exact=True),
    "mask": AdaptiveMask,
    "mask, Bernoulli": partial(AdaptiveMask, noise=noise.ScaledBernoulli()),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def sgd(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr)


def finite(module):
    return all(bool(torch.isfinite(w).all()) for w in weights(module).values())


@pytest.mark.slow
@every_form
@pytest.mark.parametrize("make", [sgd(0.0), sgd(0.1), lambda p: torch.optim.Adam(p, 1e-2)], ids=["rate 0", "SGD", "Adam"])
def test_dead_weights_stay_zero_through_a_warm_up(form, make):
    loader, module, seen = data(), Toy(optimizer=make), []
    loader.dataset.tensors[0][:, 2] = 0.0
    module.network[0].weight.data[:, 2] = 0.0
    before = weights(module)
    look = lambda moment, module: seen.append(weights(module)) if moment == "batch end" else None  # noqa: E731
    trainer(form(LOG_SUM, LinearWarmup(0.1, 0.5)), Spy(look)).fit(module, loader)
    assert all(not w["network.0.weight"][:, 2].any() for w in seen)
    still = all(torch.equal(w[name], before[name]) for w in seen for name in before)
    assert still == (make(module.parameters()).param_groups[0]["lr"] == 0)
    assert finite(module)


@pytest.mark.slow
@every_form
def test_a_sparse_network_is_fitted_again_with_a_warm_up(form):
    module = Toy()
    trainer(form(LOG_SUM, 0.05), epochs=7).fit(module, data())
    assert (module.network[0].weight == 0).any()
    trainer(form(LOG_SUM, LinearWarmup(0.05, 0.5)), epochs=2).fit(module, data())
    assert finite(module)
    assert 0 < (module.network[0].weight == 0).sum() < 128


RESTING = [penalties.L1(), LOG_SUM, penalties.MCP(1.0), penalties.HardThreshold(0.5), penalties.VariationalDropout()]


@pytest.mark.parametrize("penalty", RESTING, ids=repr)
@pytest.mark.parametrize("rho", [1e-3, 0.1, torch.logspace(-3, 0, 9, dtype=torch.float64)[:, None]], ids=["small", "large", "tensor"])
def test_the_zero_region_is_that_of_the_exact_prox(penalty, rho):
    lam, steps = 0.3, 7.0
    w = torch.cat([-torch.logspace(-5, 1, 300), torch.zeros(1), torch.logspace(-5, 1, 300)]).double().expand(9, -1)
    pull = (steps * lam * torch.as_tensor(rho, dtype=w.dtype)).expand_as(w)
    zero = {scale: penalty.prox(scale * w, pull) == 0 for scale in (0.99, 1.0, 1.01)}
    sure = zero[0.99] == zero[1.01]  # not within 1 % of the threshold
    rests = proximal.in_zero_region(penalty, w, rho if isinstance(rho, float) else rho.expand_as(w), lam, steps)
    assert torch.equal(rests[sure], zero[1.0][sure])
    assert sure.double().mean() > 0.98
    assert rests.any(1).all()
    assert (~rests).any(1).all()


@pytest.mark.parametrize("form", [ReweightedPenalty, partial(AdaptiveProx, exact=True)], ids=["penalty", "exact prox"])
def test_a_small_weight_at_its_minimum_is_kept(form):
    """The minimum of lam |w| + |w - z|^2 / 2 is z shrunk by lam; a weight there is not in the zero region."""
    torch.manual_seed(0)
    x = torch.linalg.qr(torch.randn(32, 4))[0] * 32**0.5
    half_squares = lambda prediction, y: ((prediction - y) ** 2).mean() / 2  # noqa: E731
    module = Toy(nn.Linear(4, 1, bias=False), sgd(0.1), half_squares)
    y = x @ torch.tensor([[0.15], [0.18], [1.0], [0.0]])
    trainer(form(penalties.L1(), 0.1), epochs=1).fit(module, Repeated((x, y), 120))
    w = module.network.weight.detach()[0]
    torch.testing.assert_close(w, torch.tensor([0.05, 0.08, 0.9, 0.0]), rtol=0, atol=1e-3)
    assert (w != 0).tolist() == [True, True, True, False]


def test_weights_that_oscillate_around_zero_are_zeroed(monkeypatch):
    zeros = []
    for _ in range(2):
        module = Toy()
        trainer(ReweightedPenalty(LOG_SUM, 0.02), epochs=10).fit(module, data())
        zeros.append(int((module.network[0].weight == 0).sum()))
        monkeypatch.setattr(proximal, "in_zero_region", lambda penalty, w, *rest, **more: w == 0)
    assert zeros[0] > 3 * zeros[1]
    assert 20 < zeros[0] < 100


@pytest.mark.parametrize(("curvature", "rests"), [({"curvature": None}, False), ({"ceiling": 10, "remainder": False}, True)])
def test_noise_that_is_not_calibrated_holds_no_weight_at_zero(curvature, rests):
    """At a flat minimum Adam's steps are large, but the gradient lam H w / eta of uncalibrated noise vanishes."""
    module = Toy(optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-3))
    module.loss = lambda scores, y: 1e-12 * scores.sum()  # because the gradient and Adam's moments almost vanish
    callback = AdaptiveMask(LOG_SUM, 1e-3, **curvature)
    before = weights(module)
    trainer(callback, epochs=1).fit(module, data())
    zeros = {name: (w == 0) & (before[name].abs() > 0.02) for name, w in weights(module).items() if name in callback.parameters}
    assert any(bool(where.any()) for where in zeros.values()) is rests


def pulled(w, lam):
    return w - 0.1 * lam * w.sign() / (w.abs() + 2)


def shrunk(w, lam):
    return w / (1 + 0.1 * lam / (w.abs() * (w.abs() + 2)))


@pytest.mark.parametrize(("form", "first"), [(ReweightedPenalty, True), (AdaptiveProx, False)])
def test_the_strength_follows_the_schedule(form, first):
    """Hand-written SGD at rate 0.1: lam rises from 0 at step 0 to 2 at step 4 of 8."""
    module, reference, start = Toy(optimizer=sgd(0.1)), Toy(), []
    look = lambda moment, module: start.append(weights(module)) if moment == "batch end" else None  # noqa: E731
    trainer(form(LOG_SUM, LinearWarmup(2.0, 0.5)), Spy(look)).fit(module, data())
    for step, (x, y) in enumerate([*data()] * 2):
        grads = torch.autograd.grad(reference.loss(reference(x), y), [*reference.parameters()])
        for p, g in zip(reference.parameters(), grads, strict=True):
            lam = 2.0 * min(1, step / 4) if p.dim() == 2 else 0.0
            p.data = (pulled(p.data, lam) if first else p.data) - 0.1 * g
            p.data = p.data if first else shrunk(p.data, lam)
        for name, w in weights(reference).items():
            torch.testing.assert_close(start[step][name], w, rtol=1e-4, atol=1e-6, msg=f"{name} at step {step}")


@pytest.mark.slow
@every_form
def test_the_frozen_share_is_plain_training_of_the_kept_weights(form):
    states, callback = [], form(LOG_SUM, 0.5, freeze=0.5)
    look = lambda moment, module: states.append((callback.frozen, weights(module))) if moment == "batch end" else None  # noqa: E731
    module, reference = Toy(optimizer=sgd(0.1)), Toy()
    trainer(callback, Spy(look), epochs=10).fit(module, data())
    assert [frozen for frozen, _ in states] == [False] * 19 + [True] * 21
    reference.load_state_dict(states[19][1])
    support = {name: (w != 0) | (w.dim() == 1) for name, w in states[19][1].items()}
    assert not support["network.0.weight"].all()
    for x, y in ([*data()] * 10)[20:]:
        grads = torch.autograd.grad(reference.loss(reference(x), y), [*reference.parameters()])
        for (name, p), g in zip(reference.named_parameters(), grads, strict=True):
            p.data -= 0.1 * g * support[name]
    for name, w in weights(reference).items():
        torch.testing.assert_close(module.get_parameter(name).detach(), w, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("metric", ["auto", "adam"])
def test_the_metric_equals_adams_step_size(amsgrad, metric):
    """A step of Adam is rho times the mean gradient, computed by hand here; eps is large and gradients decrease."""
    w, mean = nn.Parameter(torch.zeros(5, dtype=torch.float64)), 0.0
    optimizer = torch.optim.Adam([w], lr=0.1, betas=(0.5, 0.6), eps=1.0, amsgrad=amsgrad)
    for step, size in enumerate([10.0, 3.0, 0.1, 0.1, 0.1], start=1):
        w.grad = torch.randn_like(w) * size
        mean, before = 0.5 * mean + 0.5 * w.grad, w.detach().clone()
        optimizer.step()
        rho = steps_of.read_step_size(optimizer, w, optimizer.param_groups[0], metric)
        torch.testing.assert_close(before - rho * mean / (1 - 0.5**step), w.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [torch.optim.Adamax, torch.optim.Rprop])
def test_adams_metric_is_refused_before_training_without_second_moments(kind):
    steps = []

    class Counting(Toy):
        def training_step(self, batch, index):
            steps.append(index)
            return super().training_step(batch, index)

    with pytest.raises(ValueError, match=f"second moments.*{kind.__name__}"):
        trainer(AdaptiveProx(LOG_SUM, 0.1, metric="adam")).fit(Counting(optimizer=lambda p: kind(p, 0.01)), data())
    assert steps == []


class Late(Toy):
    def __init__(self, moment):
        super().__init__(nn.Identity())
        setattr(self, moment, self.build)

    def build(self, stage="fit"):
        if isinstance(self.network, nn.Identity):
            self.network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


@pytest.mark.parametrize("select", [None, ["network.*"]])
@pytest.mark.parametrize("moment", ["setup", "configure_model"])
def test_layers_that_are_made_late_are_selected(moment, select):
    callback, module = ReweightedPenalty(LOG_SUM, 0.1, select=select), Late(moment)
    trainer(callback, epochs=3).fit(module, data())
    assert sorted(callback.parameters) == ["network.0.weight", "network.2.weight"]
    assert 0 < (module.network[0].weight == 0).sum() < 128
