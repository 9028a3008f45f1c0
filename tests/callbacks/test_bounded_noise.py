"""Bounded noise and the penalty that it falls short of: together they are worth lam * Omega."""

from __future__ import annotations

import warnings

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from toys import Toy, data, trainer

from lightning_sparse import noise, penalties
from lightning_sparse.callbacks import AdaptiveMask, EtaTrick, ReweightedPenalty, VariationalDropout
from lightning_sparse.curvature import EmpiricalFisher, InputMoment
from lightning_sparse.curvature.estimate import EXACT, calibrated
from lightning_sparse.methods.mask import FADED, FADES, MaskFormula, faded

LOG_SUM = penalties.LogSum(eps=2.0)


@pytest.mark.parametrize("penalty", [LOG_SUM, penalties.L1(), penalties.MCP(c=0.3)], ids=repr)
@pytest.mark.parametrize(("ceiling", "alpha_min"), [(1.0, 0.9), (0.1, 0.5), (10.0, 1e-3), (1e6, 1e-6)])
def test_the_noise_to_second_order_and_the_remainder_are_the_penalty(penalty, ceiling, alpha_min):
    """H Var s w^2 / 2 + share lam w^2 / (2 eta) = lam w^2 / (2 eta), with Var s as it is drawn."""
    torch.manual_seed(0)
    w, curvature, lam = torch.randn(2000, dtype=torch.float64), torch.rand(2000, dtype=torch.float64) ** 6, 1e-2
    eta = penalty.eta_hat(w)
    variance = noise.bounded_variance(calibrated(eta, curvature, lam, ceiling), lam, alpha_min)
    share = MaskFormula(penalty, ceiling).unrealised(w, curvature, lam, alpha_min)
    total = curvature * variance * w**2 / 2 + share * lam * w**2 / eta / 2
    torch.testing.assert_close(total, lam * w**2 / eta / 2, rtol=1e-9, atol=1e-15)
    assert ((share >= 0) & (share <= 1)).all()


def test_a_weight_of_zero_and_one_that_the_penalty_leaves_alone():
    w, curvature = torch.tensor([0.0, 5.0]), torch.tensor([0.5, 0.5])
    share = MaskFormula(penalties.MCP(c=0.3), 1.0).unrealised(w, curvature, 1e-2, 0.9)
    assert share[0] == 1
    assert share.isfinite().all()
    eta = MaskFormula(penalties.MCP(c=0.3), 1.0).eta_of_both(w, curvature, 1e-2, 0.9)
    assert eta[0] == 0
    assert eta[1] == torch.inf


def test_without_noise_the_form_is_the_penalty():
    ends, quiet = [], 1 - 1e-12
    without = AdaptiveMask(LOG_SUM, 0.05, alpha_min=quiet, remainder=False)
    for form in (AdaptiveMask(LOG_SUM, 0.05, alpha_min=quiet), ReweightedPenalty(LOG_SUM, 0.05), without):
        torch.manual_seed(0)
        module = Toy(optimizer=lambda p: torch.optim.SGD(p, 0.1))
        trainer(form).fit(module, data())
        ends.append(module.network[0].weight.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-5)
    assert (ends[2] - ends[1]).abs().max() > 1e-2


def test_noise_fades_out_in_the_first_third_unless_its_bound_is_given():
    assert faded(0.9, 0.0) == faded(0.9, FADES) == pytest.approx(0.9)
    assert faded(0.9, FADED) == faded(0.9, 1.0) == 1.0
    assert 0.9 < faded(0.9, (FADES + FADED) / 2) < 1
    for made, before, after in (
        (AdaptiveMask(LOG_SUM, 1e-3), 0.97, 1.0),
        (AdaptiveMask(LOG_SUM, 1e-3, alpha_min=0.5, ceiling=3), 0.5, 0.5),
    ):
        assert made.method.smallest_keep == pytest.approx(before)
        made.strength.step, made.strength.total = 30, 100
        assert made.method.smallest_keep == pytest.approx(after)
    assert AdaptiveMask(LOG_SUM, 1e-3).method.formula.ceiling == 1
    assert AdaptiveMask(LOG_SUM, 1e-3, ceiling=3).method.formula.ceiling == 3


class Updates(Callback):
    """Record, after each training batch, how often a mask's estimate of H was updated."""

    def __init__(self, mask):
        self.mask, self.seen = mask, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(max(self.mask.curvature.updates.values(), default=0))


@pytest.mark.parametrize(("bound", "last"), [({}, 3), ({"alpha_min": 0.9}, 8)], ids=["fades", "stays"])
def test_no_curvature_is_estimated_once_the_noise_has_faded(bound, last):
    mask = AdaptiveMask(LOG_SUM, 0.05, curvature=EmpiricalFisher(every=1), **bound)
    updates = Updates(mask)
    trainer(mask, updates).fit(Toy(), data())
    assert updates.seen == [min(batch, last) for batch in range(1, 9)]


class NoisySamples(Callback):
    """Record, for each training batch, how many samples' outputs of the first layer are not W x + b, of how many."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer, pl_module):
        first, second = pl_module.network[:2]
        self.handles = [
            first.register_forward_pre_hook(lambda layer, inputs: setattr(self, "exact", layer.weight @ inputs[0].T + layer.bias[:, None])),
            second.register_forward_pre_hook(self.compare),
        ]

    def compare(self, layer, inputs):
        if layer.training:
            self.seen.append((int(((inputs[0].T - self.exact).abs().amax(0) > 1e-5).sum()), len(inputs[0])))

    def on_train_end(self, trainer, pl_module):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize(
    ("settings", "share", "end"),
    [({}, 0.25, 0.0), ({"noise": noise.Gaussian(local=True, share=1.0)}, 1.0, 0.0), ({"remainder": False}, 1.0, 1.0),
     ({"alpha_min": 0.5}, 1.0, 1.0), ({"alpha_min": 0.5, "noise": noise.Gaussian(local=True, share=0.5)}, 0.5, 0.5)],
    ids=["default", "all", "all of the penalty", "bound given", "half"],
)  # fmt: skip
def test_bounded_noise_is_for_a_quarter_of_the_samples_and_ends_with_its_fade(settings, share, end):
    watch = NoisySamples()
    trainer(AdaptiveMask(LOG_SUM, 0.05, freeze=0, curvature=EmpiricalFisher(every=1), **settings), watch, epochs=5).fit(Toy(), data())
    first, last = watch.seen[1], watch.seen[-1]  # the first batch has no estimate yet
    assert first[0] == round(share * first[1])
    assert last[0] == round(end * last[1])


class Adversarial(Toy):
    """A network that is trained as a generator: the critic's loss takes its outputs without a graph."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.critic = nn.Linear(3, 1)

    def training_step(self, batch, index):
        generator, critic = self.optimizers()
        for one, loss in (
            (critic, lambda: self.critic(self.network(batch[0]).detach())),
            (generator, lambda: self.critic(self.network(batch[0]))),
        ):
            self.toggle_optimizer(one)
            self.manual_backward((loss() - 1).square().mean())
            one.step()
            one.zero_grad()
            self.untoggle_optimizer(one)

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), 1e-2) for part in (self.network, self.critic)]


def test_a_loss_in_which_the_selected_weights_have_no_part_gives_no_warning():
    mask = AdaptiveMask(LOG_SUM, 1e-3, select=["network.*.weight"], curvature=EmpiricalFisher(every=1))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*second backward pass")
        trainer(mask, epochs=2).fit(Adversarial(), data())
    assert all(bool(mask.curvature.estimate(name).isfinite().all()) for name in mask.parameters)


@pytest.mark.parametrize("curvature", [None, InputMoment()], ids=repr)
def test_noise_that_is_exact_or_not_calibrated_is_not_bounded(curvature):
    method = AdaptiveMask(LOG_SUM, 1e-3, curvature=curvature).method
    assert (method.formula.ceiling, method.smallest_keep) == EXACT


def test_with_remainder_a_weight_is_zero_where_the_share_of_each_part_says_so():
    """1 / eta is the mean of 1 / eta_hat and 1 / (H eta_hat) by the shares of penalty and noise."""
    w, curvature, lam = torch.tensor([0.1, 0.1]), torch.tensor([1e-8, 0.5]), 1e-3
    eta = MaskFormula(LOG_SUM, 1.0).eta_of_both(w, curvature, lam, 1e-3)
    torch.testing.assert_close(eta, LOG_SUM.eta_hat(w) * torch.tensor([1.0, 0.5]), rtol=2e-2, atol=0)


def test_a_mean_over_many_steps_forgets_its_first_values():
    curvature = EmpiricalFisher(decay=0.999, every=1)
    module = nn.Sequential(nn.Linear(1, 1, bias=False))
    weights = dict(module.named_parameters())
    for step in range(60):
        curvature.begin(step, 1)
        curvature._add("0.weight", torch.full((1, 1), 100.0 if step < 20 else 1.0))
        curvature.end(None, weights)
    assert curvature.estimate("0.weight").item() < 10  # a plain mean has 34
    other = EmpiricalFisher(decay=0.999, every=1)
    other.load_state_dict(curvature.state_dict(), weights)
    for one in (curvature, other):
        one.begin(60, 1)
        one._add("0.weight", torch.ones(1, 1))
        one.end(None, weights)
    assert torch.equal(curvature.estimate("0.weight"), other.estimate("0.weight"))
    old = {name: part for name, part in other.state_dict().items() if name != "updates"}
    other.check_state(old, weights)  # a file of today
    other.load_state_dict(old, weights)
    with pytest.raises(ValueError, match="damaged 'updates'"):
        other.check_state(old | {"updates": {"0.weight": -1}}, weights)


def test_to_a_target_eta_starts_at_the_weights_own_scale():
    w = torch.tensor([0.03, -0.04, 0.05, 0.0])
    typical = LOG_SUM.eta_hat(w.double().square().mean().sqrt())
    assert EtaTrick(LOG_SUM, target_sparsity=0.8).method.start("w", w).exp() == pytest.approx([float(typical)] * 4, rel=1e-5)
    zero = EtaTrick(LOG_SUM, target_sparsity=0.8).method.start("w", torch.zeros(4))
    assert torch.equal(zero, EtaTrick(LOG_SUM, target_sparsity=0.8, keep_start=0.9933).method.start("w", torch.zeros(4)))


@pytest.mark.filterwarnings("ignore:VariationalDropout has set")
@pytest.mark.parametrize("kind", ["weight", "local", "additive"])
def test_learned_noise_under_sgd_with_momentum_stays_finite(kind):
    torch.manual_seed(0)
    module = Toy(optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9))
    trainer(VariationalDropout(0.3, noise=kind), epochs=25).fit(module, data())
    assert all(w.isfinite().all() and w.abs().max() < 100 for w in module.parameters())
