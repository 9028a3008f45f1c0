"""A network of many small weights trains, and counts its zeros, as if each of them were alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from toys import Spy, Toy, trainer, weights
from toys import data as batches

from lightning_sparse import _finite, _joined, _joint, _memory, proximal
from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, PenaltyLoss, ReweightedPenalty, _steps, _together
from lightning_sparse.conformance.loops import TwoOptimizers
from lightning_sparse.curvature import EmpiricalFisher
from lightning_sparse.noise import Gaussian, ScaledBernoulli
from lightning_sparse.penalties import LogSum
from lightning_sparse.schedules import LinearWarmup

LOG_SUM, DEPTH, ALONE = LogSum(0.05), 20, 10**9


def deep() -> nn.Sequential:
    """Small weights of a few shapes, each group of the optimisers with enough of them to be joined."""
    torch.manual_seed(0)
    small = [part for _ in range(DEPTH // 2) for part in (nn.Linear(8, 6), nn.Linear(6, 8), nn.Tanh())]
    return nn.Sequential(nn.Linear(8, 40), nn.Linear(40, 8), *small, nn.Linear(8, 3))


def groups(p: Any) -> list[dict[str, Any]]:
    """Two groups of different rates, every second layer's weight and bias in the second."""
    listed = list(p)
    first, second = ([one for number, one in enumerate(listed) if number // 2 % 2 == side] for side in (0, 1))
    return [{"params": first}, {"params": second, "lr": 5e-3}]


OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(groups(p), 1e-2),
    "SGD": lambda p: torch.optim.SGD(groups(p), 0.05, momentum=0.8),
    "climbing": lambda p: torch.optim.SGD([group | {"maximize": "lr" in group} for group in groups(p)], 1e-3),
}
FORMS: dict[str, Callable[[], Any]] = {
    "penalty": partial(ReweightedPenalty, LOG_SUM, 3e-3),
    "loss": partial(PenaltyLoss, LOG_SUM, 3e-3),
    "prox": partial(AdaptiveProx, LOG_SUM, 3e-3, threshold=1e-3),
    "prox, exact": partial(AdaptiveProx, LOG_SUM, 3e-3, exact=True),
    "mask": partial(AdaptiveMask, LOG_SUM, 3e-3, noise=Gaussian(local=True), curvature=EmpiricalFisher(every=1)),
    "mask, uncalibrated": partial(AdaptiveMask, LOG_SUM, 3e-3, noise=Gaussian(local=True), curvature=None, threshold=0.02),
}


def trained(form: Any, optimizer: Any, few: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Toy, dict[str, float], set[str]]:
    """A run in which fewer than ``few`` small tensors stay alone; its logged figures, and by which ways tensors were joined."""
    ways, flatten, block = set(), _joined.flattened, _joint.Joint._block
    with monkeypatch.context() as patch:
        patch.setattr(_joined, "FEW", few)
        patch.setattr(_joined, "flattened", lambda tensors: (ways.add("zeros"), flatten(tensors))[1])
        patch.setattr(_joint.Joint, "_block", lambda *given: (ways.add("steps"), block(*given))[1])
        module = Toy(deep(), optimizer)
        run = trainer(form, epochs=3)
        run.fit(module, batches())
    assert form._joint._plans == {}  # no weight is held after the fit
    return module, {name: float(value) for name, value in run.callback_metrics.items()}, ways


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_joining_changes_no_run(form: Any, optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, said_alone, none = trained(form(), optimizer, ALONE, monkeypatch)
    joint, said, some = trained(form(), optimizer, 2, monkeypatch)
    assert (none, some) == (set(), {"zeros"} if isinstance(form(), AdaptiveMask) else {"zeros", "steps"})
    before, after = weights(alone), weights(joint)
    assert any(not torch.equal(after[name], value) for name, value in weights(Toy(deep())).items())
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=2e-5, atol=1e-6)
        assert torch.equal(after[name] == 0, weight == 0)
    assert said.keys() == said_alone.keys()
    assert said == pytest.approx(said_alone, rel=1e-4)


@pytest.mark.parametrize("form", [pytest.param(form, id=name, marks=[pytest.mark.slow] * (name != "prox")) for name, form in FORMS.items()])
def test_zeros_of_all_are_the_zeros_of_each(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    callback, seen = form(), []

    def look(hook: str, module: Toy) -> None:
        if hook == "batch end":
            values = {name: callback._live(name) for name in callback.parameters}
            asked: list[str] = []
            with monkeypatch.context() as patch:
                patch.setattr(callback, "zeros", lambda name, w, own=callback.zeros: (asked.append(name), own(name, w))[1])
                found = _together.zeros(callback, values)
            assert list(found) == list(values)
            assert all(torch.equal(found[name], callback.zeros(name, w)) for name, w in values.items())
            seen.append((len(asked), sum(int(marks.sum()) for marks in found.values())))

    trainer(callback, Spy(look), epochs=8).fit(Toy(deep(), OPTIMIZERS["Adam"]), batches())
    assert seen[-1][0] < len(callback.parameters) / 2  # the others were found together
    assert seen[-1][1] > 0


@pytest.mark.parametrize("noise", [ScaledBernoulli(), Gaussian()], ids=["Bernoulli", "Gaussian"])
def test_each_gradient_is_multiplied_by_the_mask_of_its_own_weight(noise: Any) -> None:
    """The loss is linear in the weights, so that the gradient before the mask is known: it is 1."""
    module = Toy(deep(), lambda p: torch.optim.SGD(p, 1e-3), loss=lambda out, _: sum(p.sum() for p in module.network.parameters()))
    callback, seen = AdaptiveMask(LOG_SUM, 3e-2, noise=noise, curvature=None), []

    def look(hook: str, _: Toy) -> None:
        if hook == "before backward":
            seen.append({name: parameter.detach().clone() for name, parameter in callback.parameters.items()})
        if hook == "after backward":
            seen[-1] = {
                name: (shown, callback.parameters[name].grad.clone(), callback._live(name).clone()) for name, shown in seen[-1].items()
            }

    trainer(callback, Spy(look), epochs=1).fit(module, batches())
    for batch in seen:
        for shown, mask, live in batch.values():
            torch.testing.assert_close(shown, live * mask)
            assert not torch.equal(mask, torch.ones_like(mask))


@pytest.mark.parametrize("manual", [False, True])
def test_memory_of_masks_is_used_again_unless_a_graph_may_still_need_it(manual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_memory, "_BLOCK", 1)
    monkeypatch.setattr(_joined, "DRAWN", 2)
    callback, held = AdaptiveMask(LOG_SUM, 3e-2, noise=ScaledBernoulli(), curvature=None), []

    def look(hook: str, module: Toy) -> None:
        if hook == "batch start":
            data = module.network[0].weight.data
            held.append((data, data.clone()))

    torch.manual_seed(0)
    module = (TwoOptimizers if manual else Toy)(network=nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)))
    trainer(callback, Spy(look), epochs=1).fit(module, batches())
    assert len(held) > 2
    assert all(torch.equal(memory, then) for memory, then in held) is manual
    assert callback._kept._blocks == {}


def test_a_rate_is_shared_by_weights_of_one_group_and_one_count_of_steps() -> None:
    """A weight that joined later has other corrections of its means, and each group a rate of its own."""
    own = [nn.Parameter(torch.zeros(2, 2)) for _ in range(6)]
    optimizer = torch.optim.Adam([{"params": own[:4]}, {"params": own[4:], "lr": 0.1}])
    for late in (1, 0):
        for parameter in own[late:]:
            parameter.grad = torch.ones(2, 2)
        optimizer.step()
    del optimizer.state[own[3]]
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    kinds = _steps.alike(optimizer, [(p, groups[id(p)], (p, p.grad)) for p in own])
    assert [kind.numbers for kind in kinds] == [[0], [1, 2], [3], [4, 5]]
    assert [kind.moments for kind in kinds] == [("exp_avg_sq",)] * 2 + [()] + [("exp_avg_sq",)]
    for kind in kinds:
        for number, row in zip(kind.numbers, zip(*kind.columns, strict=True), strict=True):
            assert row[0] is own[number]
            held = kind.rate_state(row[2:])
            assert all(held[name] is optimizer.state[own[number]][name] for name in kind.moments)
            assert proximal.step_size(optimizer, own[number], kind.group, "auto") == pytest.approx(proximal.rate(held, kind.group, "auto"))


RATED = {
    "Adam": torch.optim.Adam,
    "amsgrad": partial(torch.optim.Adam, amsgrad=True),
    "Adamax": torch.optim.Adamax,
    "RMSprop": torch.optim.RMSprop,
    "centred": partial(torch.optim.RMSprop, centered=True),
    "Adadelta": torch.optim.Adadelta,
    "Adagrad": torch.optim.Adagrad,
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("make", RATED.values(), ids=RATED.keys())
def test_columns_hold_all_that_the_rate_of_each_weight_is_made_of(make: Any) -> None:
    own = [nn.Parameter(torch.zeros(2, 2)) for _ in range(3)]
    optimizer = make(own)
    for scale in (4.0, 1.0):  # the second step leaves the largest moment behind
        for number, parameter in enumerate(own):
            parameter.grad = torch.full((2, 2), scale**number * (1 + number))
        optimizer.step()
    (kind,) = _steps.alike(optimizer, [(p, optimizer.param_groups[0], (p,)) for p in own])
    for parameter, row in zip(own, zip(*kind.columns, strict=True), strict=True):
        found = proximal.rate(kind.rate_state(row[1:]), kind.group, "auto")
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(proximal.step_size(optimizer, parameter, kind.group, "auto")))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_found_among_many(value: float) -> None:
    tensors = {f"w{i}": torch.ones(3, 3) for i in range(20)}
    assert _finite.unfit(tensors) == {}
    tensors["w13"][1, 2] = value
    assert _finite.unfit(tensors) == {"w13": (int(math.isnan(value)), int(math.isinf(value)))}
    assert ("w13" in _finite.unfit(tensors, nan_only=True)) is math.isnan(value)
    tensors["w13"][1, 2], tensors["w4"], tensors["w5"] = 1.0, torch.full((3, 3), 3e38), torch.full((3, 3), 3e38)
    assert _finite.unfit(tensors) == {}  # a sum that overflows is no fault


def test_a_strength_of_zero_masks_nothing() -> None:
    callback = AdaptiveMask(LOG_SUM, LinearWarmup(0.5, share=1.0), noise=ScaledBernoulli(), curvature=None)
    masked: list[bool] = []

    def look(hook: str, module: Toy) -> None:
        if hook == "before backward":
            masked.append(any(not torch.equal(p.detach(), callback._live(name)) for name, p in callback.parameters.items()))

    trainer(callback, Spy(look), epochs=1).fit(Toy(deep()), batches())
    assert masked == [False, True, True, True]
