"""Learned parameters: their learning rate, and that the user's optimiser is not changed."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from learned_forms import FORMS, LOG_SUM, Scheduled, every_form
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.optim import lr_scheduler as rates
from toys import Repeated, Spy, Toy, data, trainer

from lightning_sparse.callbacks import EtaTrick
from lightning_sparse.conformance.optimizers import WarmUp, super_step, wrapped_step


def sequence(optimizer):
    return rates.SequentialLR(optimizer, [rates.LinearLR(optimizer, 0.1, total_iters=3), rates.CosineAnnealingLR(optimizer, 5)], [3])


SCHEDULES = {
    "none": (None, "step"),
    "LambdaLR": (lambda o: rates.LambdaLR(o, lambda step: 1 - step / 8), "step"),
    "CosineAnnealingLR": (lambda o: rates.CosineAnnealingLR(o, 8, eta_min=1e-3), "step"),
    "OneCycleLR": (lambda o: rates.OneCycleLR(o, 1e-2, total_steps=9), "step"),
    "CyclicLR": (lambda o: rates.CyclicLR(o, 1e-3, 1e-2, step_size_up=3, cycle_momentum=False), "step"),
    "SequentialLR": (sequence, "step"),
    "StepLR": (lambda o: rates.StepLR(o, 1, 0.5), "epoch"),
    "ReduceLROnPlateau": (lambda o: rates.ReduceLROnPlateau(o, patience=0, threshold=10.0), "epoch"),
}


def own_groups(callback):
    """Return the param groups of a callback's learned parameters."""
    return [group for second in callback.method.learned._second.values() for group in second.groups]


def run(module, *callbacks, epochs=2):
    """Return learning rate and momentum of the weights' group and the learned group, if any, before each step."""
    seen, own = [], next((c for c in callbacks if hasattr(c, "learned")), None)

    def look(moment, module):
        if moment == "before step":
            (group,) = module.optimizers().param_groups
            seen.append([dict(one) for one in [group, *(own_groups(own) if own else [])]])

    trainer(*callbacks, Spy(look), epochs=epochs, num_sanity_val_steps=0).fit(module, data(), data())
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learned_rate_stays_in_proportion_and_the_weights_is_as_without(name):
    schedule, interval = SCHEDULES[name]
    seen, plain = run(Scheduled(schedule, interval), FORMS["joint"]()), run(Scheduled(schedule, interval))
    assert len(seen) == len(plain) == 8
    for (weight, learned), (alone,) in zip(seen, plain, strict=True):
        assert weight["lr"] == alone["lr"]
        assert weight["betas"] == alone["betas"] == learned["betas"]
        assert (weight["weight_decay"], learned["weight_decay"]) == (0.1, 0.0)
        assert learned["lr"] == pytest.approx(weight["lr"] * (50 if name == "CyclicLR" else 5))
    assert name == "none" or len({weight["lr"] for weight, _ in seen}) > 1


def test_the_module_keeps_its_parameters_and_keys_and_the_optimiser_is_left_as_it_was(tmp_path):
    keys, moments = [], []

    def look(moment, module):
        keys.append((tuple(module.state_dict()), tuple(dict(module.named_parameters()))))
        moments.append(moment)

    module, callback = Scheduled(), FORMS["joint"]()
    names = tuple(dict(module.named_parameters()))
    fit = trainer(callback, Spy(look), epochs=1)
    fit.fit(module, data())
    assert set(keys) == {(names, names)}
    assert "before step" in moments
    (group,) = fit.optimizers[0].param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in module.parameters()} == {id(p) for p in fit.optimizers[0].state}


def test_accumulated_batches_give_the_learned_parameters_their_mean_gradient():
    """Accumulating two equal batches equals one step with that batch, also for log eta."""
    batch = next(iter(data()))
    ends = []
    for times in (1, 2):
        callback, module = FORMS["joint"](), Scheduled(make=partial(torch.optim.SGD, lr=0.1))
        trainer(callback, epochs=1, accumulate_grad_batches=times).fit(module, Repeated(batch, 3 * times))
        ends.append(callback.state_dict()["learned"])
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value)


class Backboned(Toy):
    """A module for BackboneFinetuning."""

    def __init__(self, seed=0):
        super().__init__(nn.Linear(16, 3), seed=seed)
        self.backbone = nn.Linear(8, 16)

    def forward(self, x):
        return self.network(torch.relu(self.backbone(x)))

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 1e-2)


@pytest.mark.slow
@every_form
def test_parameters_that_join_in_mid_run_are_learned_and_the_finetuning_finds_its_group(form):
    seen, callback = [], form()
    finetuning = BackboneFinetuning(1, lambda epoch: 0.5, backbone_initial_ratio_lr=0.1, should_align=False)

    def look(moment, module):
        if moment == "before step":
            groups = module.optimizers().param_groups + own_groups(callback)
            find = lambda p: next(group["lr"] for group in groups if any(one is p for one in group["params"]))  # noqa: E731
            pairs = [(module.network.weight, "network.weight"), (module.backbone.weight, "backbone.weight")]
            seen.append([(find(p), find(callback.learned[name])) for p, name in pairs if name in callback.learned])

    module = Backboned()
    trainer(callback, finetuning, Spy(look), epochs=4).fit(module, data())
    assert [len(rates) for rates in seen] == [1] * 4 + [2] * 12
    heads, backbones = [rates[0] for rates in seen], [rates[1] for rates in seen[4:]]
    assert heads == [(1e-2, pytest.approx(0.05))] * 16
    assert [rate for rate, _ in backbones[::4]] == pytest.approx([1e-3, 5e-4, 2.5e-4])  # as BackboneFinetuning sets them
    assert [own for _, own in backbones[::4]] == pytest.approx([0.05, 0.025, 0.0125])
    start = callback.method.start("backbone.weight", module.backbone.weight.detach())
    assert (callback.state_dict()["learned"]["backbone.weight"] - start).abs().min() > 1e-6


def test_an_optimiser_that_the_user_keeps_is_given_back_without_the_learned_group():
    module = Scheduled()
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    module.configure_optimizers = lambda: optimizer
    for _ in range(2):
        trainer(FORMS["joint"](), epochs=1).fit(module, data())
        assert len(optimizer.param_groups) == 1
        assert not {"step", "zero_grad"} & vars(optimizer).keys()


class Discarding(Toy):
    """A toy with one optimiser per layer that discards the gradients of a first backward pass."""

    def __init__(self, discard):
        super().__init__()
        self.discard, self.automatic_optimization = discard, False

    def configure_optimizers(self):
        return [torch.optim.SGD(self.network[i].parameters(), 0.1) for i in (0, 2)]

    def training_step(self, batch, index):
        for _ in range(1 + self.discard):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            torch.manual_seed(index)
            self.manual_backward(super().training_step(batch, index))
        for optimizer in self.optimizers():
            optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("form", [FORMS["VarDrop, weight"], FORMS["L0"]], ids=["VarDrop, weight", "L0"])
def test_two_optimisers_train_their_own_and_discarded_gradients_leave_no_trace(form):
    ends = []
    for discard in (False, True):
        callback = form()
        trainer(callback, epochs=1).fit(Discarding(discard), data())
        ends.append(callback.state_dict()["learned"])
    for name in ("network.0.weight", "network.2.weight"):
        assert (ends[0][name] != ends[0][name].reshape(-1)[0]).any()
        assert torch.equal(ends[0][name], ends[1][name])


# -- an optimiser of their own ----------------------------------------------------------------------------------------------


@every_form
def test_a_scheduler_that_holds_another_sees_the_groups_that_the_module_made(form):
    seen, plain = run(Scheduled(WarmUp), form()), run(Scheduled(WarmUp))
    assert [group["lr"] for group, _ in seen] == [group["lr"] for (group,) in plain]
    assert all(learned["lr"] == pytest.approx(5 * weight["lr"]) for weight, learned in seen)
    assert len({weight["lr"] for weight, _ in seen}) > 4


def learned_of(module, form=FORMS["VarDrop"], epochs=1, **options):
    callback = form()
    torch.manual_seed(0)
    trainer(callback, epochs=epochs, **options).fit(module, data())
    return callback.state_dict()["learned"]


@pytest.mark.parametrize("make", [super_step, wrapped_step, lambda p: torch.optim.Adagrad(p, 0.1)], ids=["super", "held", "Adagrad"])
@every_form
@pytest.mark.filterwarnings("ignore:.* the step size of Adagrad for those is not known")
def test_they_are_trained_beside_any_optimiser(form, make):
    start = form()
    found = learned_of(Toy(optimizer=make), form)
    for name, value in found.items():
        begun = start.method.start(name, torch.zeros_like(value))
        assert (value - begun).abs().max() > 1e-3


def fp16(scale):
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


def test_a_learned_gradient_that_overflows_alone_skips_the_step_and_lowers_the_scale():
    seen, plugin = [], fp16(256.0)
    callback = type(FORMS["VarDrop, weight"]())(0.1, noise="weight", log_start=2.9)
    method, add = callback.method, callback.method.add_noise_gradient
    method.add_noise_gradient = lambda name, grad: add(name, grad * (torch.inf if method.forwards.draws == 2 else 1.0))
    look = lambda moment, module: seen.append((callback.step, plugin.scaler.get_scale())) if moment == "batch end" else None  # noqa: E731
    trainer(callback, Spy(look), epochs=1, plugins=[plugin]).fit(Toy(), data())
    assert seen == [(1, 256.0), (1, 128.0), (2, 128.0), (3, 128.0)]
    assert all(bool(value.isfinite().all()) for value in callback.state_dict()["learned"].values())


def test_the_trainers_clipping_shortens_the_learned_gradients_as_those_of_the_weights_and_is_not_theirs():
    """With SGD and no noise, log eta moves by rate * clip factor * gradient; the norm includes only the module's gradients."""
    grads, moved = [], []
    callback = EtaTrick(LOG_SUM, 0.5, keep_start=0.3)

    class Looking(Toy):
        def on_before_optimizer_step(self, optimizer):
            grads.append(
                (torch.stack([p.grad.norm() for p in self.parameters()]).norm(), callback.learned["network.0.weight"].grad.clone())
            )
            moved.append(callback.learned["network.0.weight"].detach().clone())

        def on_train_batch_end(self, *_):
            moved[-1] = callback.learned["network.0.weight"].detach() - moved[-1]

    module = Looking(optimizer=lambda p: torch.optim.SGD(p, 0.1))
    trainer(callback, epochs=1, gradient_clip_val=0.1).fit(module, data())
    for (norm, slope), step in zip(grads, moved, strict=True):
        assert norm > 0.11
        torch.testing.assert_close(step, -0.1 * slope * 0.1 / norm, rtol=1e-3, atol=1e-7)


def test_the_modules_optimiser_has_its_own_groups_alone_at_every_moment():
    groups = []
    look = lambda moment, module: groups.append(len(module.optimizers().param_groups))  # noqa: E731
    trainer(FORMS["joint"](), Spy(look), epochs=1).fit(Toy(), data())
    assert set(groups) == {1}
