"""Skipped, accumulated, clipped, fused and manual steps, each against a hand-written run or an independent result."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from toys import Repeated, Spy, Toy, data, trainer, weights

from lightning_sparse import conformance, noise, penalties
from lightning_sparse import optimizer as steps_of
from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, ReweightedPenalty
from lightning_sparse.conformance.loops import Gan
from lightning_sparse.conformance.precision import Overflowing
from lightning_sparse.conformance.steps import MOMENTA
from lightning_sparse.curvature import EmpiricalFisher, SampledFisher
from lightning_sparse.schedules import LinearWarmup

LOG_SUM = penalties.LogSum(eps=2.0)
BERNOULLI = {"noise": noise.ScaledBernoulli()}
FORMS = {
    "penalty": ReweightedPenalty,
    "prox": AdaptiveProx,
    "exact prox": partial(AdaptiveProx, exact=True),
    "mask": AdaptiveMask,
    "mask, Bernoulli": partial(AdaptiveMask, **BERNOULLI),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
OPTIMIZERS = {
    "Adam": partial(torch.optim.Adam, lr=1e-2),
    "fused Adam": partial(torch.optim.Adam, lr=1e-2, fused=True),
    "fused SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
}


def sgd(lr, **options):
    return partial(torch.optim.SGD, lr=lr, **options)


def fp16():
    """Make an fp16 plugin with a scale at which nothing overflows by itself."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))


# -- skipped steps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("name", ["penalty", "prox", "mask, Bernoulli"])
def test_a_skipped_step_is_no_step_of_the_schedule_and_moves_nothing(name, make):
    """Batch 2 of 4 overflows in both epochs: 6 of 8 steps count, and skipped steps change no weight."""
    lam, seen = LinearWarmup(0.5, 1.0), []
    callback = FORMS[name](LOG_SUM, lam)
    spy = Spy(lambda moment, module: seen.append((callback.step, callback.lam, weights(module))) if moment == "batch end" else None)
    trainer(callback, spy, plugins=[fp16()]).fit(Overflowing(optimizer=make), data())
    assert [step for step, *_ in seen] == [1, 2, 2, 3, 4, 5, 5, 6]
    assert seen[2][1] == seen[1][1] == lam(2, 8)
    for skipped in (2, 6):
        assert all(torch.equal(w, seen[skipped - 1][2][key]) for key, w in seen[skipped][2].items())
    assert not any(torch.equal(w, seen[0][2][key]) for key, w in seen[1][2].items())


class Twice(Toy):
    """Manual optimisation, two steps per batch; the first of the second batch overflows. Records the weights of each forward."""

    def __init__(self, make):
        super().__init__(optimizer=make)
        self.automatic_optimization, self.seen = False, []

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        for turn in range(2):
            self.seen.append(self.network[0].weight.detach().clone())
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index) * (1e30 if (index, turn) == (1, 0) else 1.0))
            optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_after_a_skipped_manual_step_the_next_forward_is_masked_as_before(make):
    module = Twice(make)
    trainer(AdaptiveMask(LOG_SUM, 0.3, curvature=None, **BERNOULLI), epochs=1, plugins=[fp16()]).fit(module, data())
    assert all((w == 0).any() for w in module.seen)
    assert torch.equal(module.seen[2], module.seen[3])
    assert not torch.equal(module.seen[0], module.seen[1])


@pytest.mark.parametrize("curvature", [EmpiricalFisher(every=1), SampledFisher(every=1)], ids=["empirical", "sampled"])
def test_curvature_survives_an_overflow_and_is_that_of_float32(curvature):
    """Without the scale the fp16 gradients of this loss would underflow; one step per run overflows."""

    class Small(Toy):
        def training_step(self, batch, index):
            return super().training_step(batch, index) * (1e30 if index == 2 else 1.0)

    found = []
    for options in ({}, {"plugins": [fp16()]}):
        callback = AdaptiveMask(LOG_SUM, 0.1, noise=noise.Gaussian(), curvature=curvature, alpha_min=0.999)
        module = (Small if options else Toy)(optimizer=sgd(0.0))
        batches = [*data()]
        spy = Spy(lambda moment, _, c=callback: found.append(c.curvature.state_dict()["mean"]) if moment == "before step" else None)
        trainer(callback, spy, epochs=1, limit_train_batches=4, **options).fit(module, data())
        assert len(batches) == 4
    for name, w in found[1].items():  # after the second batch, before the overflow
        torch.testing.assert_close(found[5][name], w, rtol=0.1, atol=float(w.max()) / 50, msg=name)
    assert all(bool(w.isfinite().all()) for w in found[-1].values())


# -- accumulation and clipping ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "first"), [(ReweightedPenalty, True), (AdaptiveProx, False)])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_each_step_has_one_penalty_gradient_for_any_number_of_batches(form, first, window):
    """Hand-written SGD at rate 0.1 over 4 batches, accumulated as 3 + 1; the penalty's gradient is lam / (|w| + 2)."""
    module, reference, lam = Toy(optimizer=sgd(0.1)), Toy(), 0.3
    ends = []
    spy = Spy(lambda moment, module: ends.append(weights(module)) if moment == "batch end" else None)
    trainer(form(LOG_SUM, lam), spy, epochs=1, accumulate_grad_batches=window).fit(module, data())
    batches = [*data()]
    for start in range(0, 4, window):
        loss = sum(reference.loss(reference(x), y) for x, y in batches[start : start + window]) / window
        for p, g in zip(reference.parameters(), torch.autograd.grad(loss, [*reference.parameters()]), strict=True):
            pull = lam * (p.dim() == 2)
            if first:
                p.data -= 0.1 * (g + pull * p.data.sign() / (p.data.abs() + 2))
            else:
                p.data -= 0.1 * g
                p.data /= 1 + 0.1 * pull / (p.data.abs() * (p.data.abs() + 2)).clamp(min=1e-30)
    for name, w in weights(reference).items():
        torch.testing.assert_close(ends[-1][name], w, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(("form", "first"), [(ReweightedPenalty, True), (AdaptiveProx, False)])
def test_clipping_scales_the_penalty_gradient_too(form, first):
    """Hand-written SGD at rate 0.1: the clip factor scales the gradient and the penalty's gradient alike."""
    module, reference, lam, clip = Toy(optimizer=sgd(0.1)), Toy(), 0.3, 0.2
    ends, factors = [], []
    spy = Spy(lambda moment, module: ends.append(weights(module)) if moment == "batch end" else None)
    trainer(form(LOG_SUM, lam), spy, epochs=1, gradient_clip_val=clip).fit(module, data())
    for x, y in data():
        grads = torch.autograd.grad(reference.loss(reference(x), y), [*reference.parameters()])
        pulls = [lam * p.data.sign() / (p.data.abs() + 2) * (p.dim() == 2) for p in reference.parameters()]
        steps = [g + pull for g, pull in zip(grads, pulls, strict=True)] if first else [*grads]
        factors.append(min(1.0, clip / float(torch.stack([step.norm() for step in steps]).norm())))
        for p, step in zip(reference.parameters(), steps, strict=True):
            p.data -= 0.1 * factors[-1] * step
            if not first and p.dim() == 2:
                p.data /= 1 + 0.1 * factors[-1] * lam / (p.data.abs() * (p.data.abs() + 2))
    assert max(factors) < 0.9
    for name, w in weights(reference).items():
        torch.testing.assert_close(ends[-1][name], w, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
@every_form
def test_strong_clipping_does_not_make_everything_zero(form):
    zeros = []
    for clip in (None, 0.03):
        module = Toy()
        trainer(form(LOG_SUM, 0.02), epochs=15, gradient_clip_val=clip).fit(module, data())
        zeros.append(int((module.network[0].weight == 0).sum()))
    assert 0 < zeros[1] <= zeros[0] + 20 < 128


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
def test_a_resumed_run_knows_how_its_gradients_were_clipped(tmp_path):
    keeper, first, again = ModelCheckpoint(tmp_path, filename="half"), AdaptiveProx(LOG_SUM, 0.1), AdaptiveProx(LOG_SUM, 0.1)
    trainer(first, keeper, epochs=2, gradient_clip_val=0.05, enable_checkpointing=True).fit(Toy(), data())
    seen = []

    class Looking(Toy):
        def on_train_start(self):
            seen.append(again.state_dict()["clipped"])

    trainer(again, epochs=3, gradient_clip_val=0.05).fit(Looking(), data(), ckpt_path=tmp_path / "half.ckpt")
    assert seen == [torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"][first.state_key]["clipped"]]
    assert 0 < seen[0] < 0.3


def test_the_penalty_is_subtracted_where_the_optimiser_maximises():
    ends = []
    for sign in (1, -1):
        loss = lambda prediction, y, sign=sign: sign * nn.functional.cross_entropy(prediction, y)  # noqa: E731
        module = Toy(optimizer=sgd(0.1, maximize=sign < 0), loss=loss)
        trainer(ReweightedPenalty(LOG_SUM, 0.3)).fit(module, data())
        ends.append(weights(module))
    assert all(torch.equal(w, ends[1][name]) for name, w in ends[0].items())


KINDS = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "SGD, momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "SGD, Nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "SGD, dampening": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.5}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01}),
    "RMSprop, momentum": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "eps": 0.1}),
    "RMSprop, centred": (torch.optim.RMSprop, {"lr": 0.01, "centered": True, "eps": 0.5}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.01, "eps": 0.1}),
    "Adadelta": (torch.optim.Adadelta, {"lr": 0.1}),
    "Adamax": (torch.optim.Adamax, {"lr": 0.1}),
    "Adam": (torch.optim.Adam, {"lr": 0.1, "eps": 0.1}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.0}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.1}),
}


@pytest.mark.parametrize(("kind", "options"), KINDS.values(), ids=KINDS.keys())
def test_a_step_is_as_long_as_the_rate_says_in_every_optimiser(kind, options):
    """Under a constant gradient a step moves a weight by rate * gain * gradient; the prox must use the same step size."""
    w = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    gradient = torch.tensor([-2.0, 0.1, 0.5, 1.0], dtype=torch.float64)
    optimizer = kind([w], **options)
    for _ in range(150):
        w.grad, before = gradient.clone(), w.detach().clone()
        optimizer.step()
    rho = steps_of.read_step_size(optimizer, w, optimizer.param_groups[0], "auto") * steps_of.momentum_gain(optimizer.param_groups[0])
    torch.testing.assert_close(before - rho * gradient, w.detach(), rtol=0, atol=0.05 * float((w.detach() - before).abs().min()))


def test_a_small_penalty_gradient_does_not_underflow_in_half_precision():
    """lr * lam of the first step underflows float16, the resulting update does not."""
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
    found = []
    for dtype in (torch.float64, torch.float16):
        state = {"step": 1, "exp_avg_sq": torch.full((3,), 1e-6, dtype=dtype)}
        tensors, scalars = steps_of.step_size_terms(state, group, "adam", 1e-5)
        found.append(steps_of.step_size(*tensors, *scalars))
    exact, half = found
    torch.testing.assert_close(half.double(), exact, rtol=0.1, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*of the selected weights to zero in")  # what is compared is how far they have shrunk
@pytest.mark.parametrize(("name", "lr"), [("SGD, momentum", 0.01), ("RMSprop, momentum", 0.002), ("Adagrad", 0.1)])
def test_the_prox_is_as_strong_as_the_penalty_under_any_optimiser(name, lr):
    """For lam |w| + |w - z|^2 / 2 with noisy gradients both callbacks reach, on average, z shrunk by lam."""
    torch.manual_seed(0)
    kind, options = KINDS[name]
    x = torch.linalg.qr(torch.randn(32, 3))[0] * 32**0.5
    y, ends = x @ torch.tensor([[0.05], [0.5], [1.0]]), []
    for form in (ReweightedPenalty, partial(AdaptiveProx, exact=True)):

        class Noisy(Toy):
            def training_step(self, batch, index):
                noise_ = torch.randn(1, 3, generator=torch.Generator().manual_seed(index))
                return ((self(batch[0]) - batch[1]) ** 2).mean() / 2 + 0.5 * (noise_ * self.network.weight).sum()

        found: list[torch.Tensor] = []
        module = Noisy(nn.Linear(3, 1, bias=False), partial(kind, **(options | {"lr": lr})))
        module.network.weight.data.copy_(torch.tensor([[0.05, 0.5, 1.0]]))
        spy = Spy(lambda moment, m, found=found: found.append(m.network.weight.detach()[0].clone()) if moment == "batch end" else None)
        trainer(form(penalties.L1(), 0.2), spy, epochs=1).fit(module, Repeated((x, y), 300))
        ends.append(torch.stack(found[100:]).mean(0))
    torch.testing.assert_close(ends[0][1:], torch.tensor([0.3, 0.8]), rtol=0, atol=0.1)
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0.05)


# -- manual optimisation ----------------------------------------------------------------------------------------------------


def gan(**options):
    torch.manual_seed(0)
    layers = lambda *sizes: nn.Sequential(nn.Linear(*sizes[:2]), nn.Tanh(), nn.Linear(*sizes[1:]))  # noqa: E731
    return Gan(layers(4, 16, 8), layers(8, 16, 1), (4,), **options)


@pytest.mark.parametrize("bare", [False, True], ids=["manual_backward", "loss.backward"])
def test_curvature_is_estimated_for_both_networks_of_a_gan(bare):
    """The networks are trained in turn; each backward pass involves only one of them."""
    module, callback = gan(), AdaptiveMask(LOG_SUM, 0.1)
    if bare:
        module.manual_backward = lambda loss: loss.backward()
    trainer(callback, epochs=1).fit(module, data())
    assert sorted(callback.curvature.mean) == sorted(callback.parameters)
    assert all(bool((mean > 0).any()) for mean in callback.curvature.mean.values())


def test_a_network_that_is_toggled_off_learns_nothing_of_the_others_curvature():
    means = []
    for factor in (1.0, 100.0):
        module, callback = gan(make=sgd(0.0)), AdaptiveMask(LOG_SUM, 0.1, curvature=EmpiricalFisher(every=1))
        judge = module._loss
        module._loss = lambda samples, truth, j=judge, f=factor: j(samples, truth) * (f if samples.requires_grad else 1.0)
        torch.manual_seed(1)
        trainer(callback, epochs=1, limit_train_batches=1).fit(module, data())
        means.append(callback.curvature.mean)
    assert torch.equal(means[0]["discriminator.0.weight"], means[1]["discriminator.0.weight"])
    assert not torch.equal(means[0]["generator.0.weight"], means[1]["generator.0.weight"])


@pytest.mark.parametrize("kind", [noise.ScaledBernoulli(), noise.Gaussian(local=True)], ids=["on weights", "on outputs"])
def test_every_forward_of_a_gan_is_noisy_though_one_network_is_toggled_off(kind):
    """The discriminator runs once in the generator's step, where it is toggled off, and twice in its own step."""
    module, outputs = gan(), []
    x = torch.randn(16, 8)
    module.discriminator.register_forward_hook(lambda layer, inputs, output: outputs.append((inputs[0].detach(), output.detach())))
    twin = gan().discriminator
    module.make = sgd(0.0)
    trainer(AdaptiveMask(LOG_SUM, 0.3, noise=kind, curvature=None), epochs=1).fit(module, Repeated((x, x), 3))
    assert len(outputs) == 9
    assert not any(torch.allclose(twin(given), output, atol=1e-2) for given, output in outputs)


class Probe(nn.Module):
    """A toy whose loss is the sum of its weights, so that the gradient is the mask."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return self.layer.weight.sum() * x.mean().abs()


def test_two_backwards_of_one_forward_see_one_mask_though_curvature_moves():
    grads = []

    class Halves(Toy):
        def __init__(self):
            super().__init__(Probe(), sgd(0.0))
            self.automatic_optimization = False

        def training_step(self, batch, index):
            optimizer = self.optimizers()
            for factor in (1.0, 1.0):
                optimizer.zero_grad()
                self.manual_backward(self.network(torch.ones(2, 8)) * factor)
                grads.append(self.network.layer.weight.grad.clone())
            optimizer.step()

    callback = AdaptiveMask(LOG_SUM, 0.3, alpha_min=1e-3, ceiling=10, curvature=EmpiricalFisher(every=1, decay=0.5), **BERNOULLI)
    trainer(callback, epochs=2).fit(Halves(), data())
    assert len(grads) == 16
    assert (grads[-1] == 0).any()
    for first, second in zip(grads[::2], grads[1::2], strict=True):
        assert torch.equal(first, second)


def test_an_optimiser_stepped_behind_lightnings_back_is_refused_by_the_penalty_form_alone():
    class Raw(Toy):
        def __init__(self):
            super().__init__(optimizer=sgd(0.1))
            self.automatic_optimization = False

        def training_step(self, batch, index):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            optimizer.step()

    with pytest.raises(RuntimeError, match=r"SGD.step\(\) was called without .* step the optimisers of self.optimizers\(\), or use"):
        trainer(ReweightedPenalty(LOG_SUM, 0.3)).fit(Raw(), data())
    for form in (AdaptiveProx, AdaptiveMask):
        module = Raw()
        whole = {"alpha_min": 1e-3, "ceiling": 10, "remainder": False} if form is AdaptiveMask else {}
        trainer(form(LOG_SUM, 0.3, **whole)).fit(module, data())
        assert (module.network[0].weight == 0).any()
    with pytest.warns(UserWarning, match=r"SGD.step\(\) was called without .*AdaptiveMask adds what bounded noise falls short of"):
        trainer(AdaptiveMask(LOG_SUM, 0.3)).fit(Raw(), data())


# -- momentum and decay -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("make", MOMENTA.values(), ids=MOMENTA.keys())
@every_form
def test_weights_that_momentum_moves_out_of_the_support_are_zeroed(form, make):
    seen, callback = [], form(LOG_SUM, 0.05, freeze=0.5)
    spy = Spy(lambda moment, module: seen.append(weights(module)) if moment == "batch end" and callback.frozen else None)
    trainer(callback, spy, epochs=10).fit(Toy(optimizer=make), data())
    dead = {name: w == 0 for name, w in seen[0].items() if w.dim() > 1}
    assert any(zero.any() for zero in dead.values())
    for later in seen[1:]:
        for name, zero in dead.items():
            assert torch.equal(later[name] == 0, zero)
    assert any(not torch.equal(seen[0][name][~zero], seen[-1][name][~zero]) for name, zero in dead.items())


# -- on a GPU -----------------------------------------------------------------------------------------------------------------


def on_gpu(name):
    """Make a subject whose trainers use CUDA and, by default, fp16 with a GradScaler."""

    class OnGpu(conformance.Subject):
        def trainer(self, *neighbours, first=True, **options):
            own = [*self.callbacks()]
            kind = {} if "precision" in options else {"precision": "16-mixed"}
            options = {key: value for key, value in options.items() if key != "plugins"} | {"accelerator": "gpu", "devices": 1} | kind
            return trainer(*(own + [*neighbours] if first else [*neighbours] + own), **options)

    return OnGpu(name, lambda: [FORMS[name](LOG_SUM, 0.3)])


ON_GPU = ["frozen_zeros_stay", "skipped_steps_touch_nothing", "fused_fp16_equals_plain", "kinds_of_steps_agree", "clipping_holds"]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: fp16 with a GradScaler and fused optimisers there")
@pytest.mark.parametrize("check", ON_GPU)
@pytest.mark.parametrize("name", FORMS)
def test_fp16_and_fused_optimisers_on_a_gpu(name, check):
    found = conformance.outcome(on_gpu(name), check)
    assert found.verdict == "pass", found.reason


class Regroups(Toy):
    """Reload the optimiser's state during the run, move a weight to a new group, and set the other group's rate to 0."""

    def configure_optimizers(self):
        return torch.optim.SGD([self.network[0].weight, self.network[2].weight], 0.1)

    def on_train_batch_start(self, batch, index):
        if index == 2:
            optimizer = self.optimizers().optimizer
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.param_groups[0]["lr"] = 0.0
            optimizer.add_param_group({"params": [optimizer.param_groups[0]["params"].pop()], "lr": 0.1})


def test_groups_that_change_in_mid_run_are_seen():
    """Loading a state replaces the param groups by new dicts, and the rate is read from them at each step."""
    seen, module = [], Regroups()
    look = lambda moment, module: seen.append(weights(module)) if moment == "batch end" else None  # noqa: E731
    trainer(AdaptiveProx(LOG_SUM, 0.5), Spy(look), epochs=1).fit(module, data(128))
    first, second = ([w[name] for w in seen] for name in ("network.0.weight", "network.2.weight"))
    assert not torch.equal(first[0], first[1])
    assert all(torch.equal(first[1], later) for later in first[2:])
    assert all(later.abs().sum() < 0.9 * before.abs().sum() for before, later in itertools.pairwise(second))  # moved by the penalty
