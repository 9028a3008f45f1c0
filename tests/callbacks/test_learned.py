"""Parameters that a callback trains in the user's optimiser: where they join, what files hold, how runs go on."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from learned_forms import FORMS, Scheduled, every_form
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn
from torch.optim import lr_scheduler as rates
from toys import Repeated, Spy, Toy, data, trainer


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


def run(module, *callbacks, epochs=2):
    """Rates and momenta of the weights' group, and of the learned one where there is one, before each step."""
    seen, own = [], next((c for c in callbacks if hasattr(c, "learned")), None)

    def look(moment, module):
        if moment == "before step":
            ids = {id(p) for p in own.learned.values()} if own else set()
            seen.append([dict(group, own=id(group["params"][0]) in ids) for group in module.optimizers().param_groups])

    trainer(*callbacks, Spy(look), epochs=epochs, num_sanity_val_steps=0).fit(module, data(), data())
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learned_rate_stays_in_proportion_and_the_weights_is_as_without(name):
    schedule, interval = SCHEDULES[name]
    seen, plain = run(Scheduled(schedule, interval), FORMS["joint"]()), run(Scheduled(schedule, interval))
    assert len(seen) == len(plain) == 8
    for (weight, learned), (alone,) in zip(seen, plain, strict=True):
        assert (weight["own"], learned["own"]) == (False, True)
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
    """Two equal batches accumulated are one step of that batch, for log eta too."""
    batch = next(iter(data()))
    ends = []
    for times in (1, 2):
        callback, module = FORMS["joint"](), Scheduled(make=partial(torch.optim.SGD, lr=0.1))
        trainer(callback, epochs=1, accumulate_grad_batches=times).fit(module, Repeated(batch, 3 * times))
        ends.append(callback.state_dict()["learned"])
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value)


class Backboned(Toy):
    """What BackboneFinetuning knows."""

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
            groups = module.optimizers().param_groups
            find = lambda p: next(group["lr"] for group in groups if any(one is p for one in group["params"]))  # noqa: E731
            pairs = [(module.network.weight, "network.weight"), (module.backbone.weight, "backbone.weight")]
            seen.append([(find(p), find(callback.learned[name])) for p, name in pairs if name in callback.learned])

    module = Backboned()
    trainer(callback, finetuning, Spy(look), epochs=4).fit(module, data())
    assert [len(rates) for rates in seen] == [1] * 4 + [2] * 12
    heads, backbones = [rates[0] for rates in seen], [rates[1] for rates in seen[4:]]
    assert heads == [(1e-2, pytest.approx(0.05))] * 16
    assert [rate for rate, _ in backbones[::4]] == pytest.approx([1e-3, 5e-4, 2.5e-4])  # as the finetuning sets them
    assert [own for _, own in backbones[::4]] == pytest.approx([0.05, 0.025, 0.0125])
    start = callback.start("backbone.weight", module.backbone.weight.detach())
    assert (callback.state_dict()["learned"]["backbone.weight"] - start).abs().min() > 1e-6


def test_an_optimiser_that_the_user_keeps_is_given_back_without_the_learned_group():
    module = Scheduled()
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    module.configure_optimizers = lambda: optimizer
    for _ in range(2):
        trainer(FORMS["joint"](), epochs=1).fit(module, data())
        assert len(optimizer.param_groups) == 1


class Discarding(Toy):
    """An optimiser for each layer; a backward whose gradients are thrown away comes before the one that counts."""

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
