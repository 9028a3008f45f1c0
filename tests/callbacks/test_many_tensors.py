"""Training and counting zeros of many small tensors equals processing each tensor alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from toys import Moved, Spy, Toy, trainer, weights
from toys import data as batches

from lightning_sparse import optimizer as steps_of
from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, PenaltyLoss, ReweightedPenalty
from lightning_sparse.conformance.loops import TwoOptimizers
from lightning_sparse.curvature import EmpiricalFisher
from lightning_sparse.elementwise import engine, pieces
from lightning_sparse.noise import Gaussian, ScaledBernoulli
from lightning_sparse.penalties import LogSum
from lightning_sparse.schedules import LinearWarmup

LOG_SUM, DEPTH, ALONE = LogSum(0.05), 20, 10**9


def deep() -> nn.Sequential:
    """Build a network of many small weights of a few shapes, enough in each param group for buckets."""
    torch.manual_seed(0)
    small = [part for _ in range(DEPTH // 2) for part in (nn.Linear(8, 6), nn.Linear(6, 8), nn.Tanh())]
    return nn.Sequential(nn.Linear(8, 40), nn.Linear(40, 8), *small, nn.Linear(8, 3))


def groups(p: Any) -> list[dict[str, Any]]:
    """Make two param groups of different rates; the second has every second layer."""
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


def trained(form: Any, optimizer: Any, few: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Toy, dict[str, float], list[int]]:
    """Train with buckets of at least ``few`` small tensors; also return logged figures and all bucket sizes."""
    sizes: list[int] = []
    grouped = engine.bucket_rows
    with monkeypatch.context() as patch:
        patch.setattr(pieces, "FEW", few)
        patch.setattr(
            engine, "bucket_rows", lambda *given, **how: [sizes.append(len(one)) or one for one in grouped(*given, **({"few": few} | how))]
        )
        module = Toy(deep(), optimizer)
        run = trainer(form, epochs=3)
        run.fit(module, batches())
    return module, {name: float(value) for name, value in run.callback_metrics.items()}, sizes


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_buckets_change_no_run(form: Any, optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, said_alone, single = trained(form(), optimizer, ALONE, monkeypatch)
    shared, said, several = trained(form(), optimizer, 2, monkeypatch)
    assert max(single, default=1) == 1 < max(several)
    before, after = weights(alone), weights(shared)
    assert any(not torch.equal(after[name], value) for name, value in weights(Toy(deep())).items())
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=2e-5, atol=1e-6)
        assert torch.equal(after[name] == 0, weight == 0)
    assert said.keys() == said_alone.keys()
    assert said == pytest.approx(said_alone, rel=1e-4)


@pytest.mark.parametrize("form", [pytest.param(form, id=name, marks=[pytest.mark.slow] * (name != "prox")) for name, form in FORMS.items()])
def test_zeros_of_all_are_the_zeros_of_each(form: Any) -> None:
    callback, seen = form(), []

    def look(hook: str, module: Toy) -> None:
        if hook == "batch end":
            found = callback.all_zeros()
            assert list(found) == list(callback.parameters)
            assert all(torch.equal(zeros, callback.zeros(name)) for name, zeros in found.items())
            seen.append(sum(int(zeros.sum()) for zeros in found.values()))

    trainer(callback, Spy(look), epochs=8).fit(Toy(deep(), OPTIMIZERS["Adam"]), batches())
    assert seen[-1] > 0


@pytest.mark.parametrize("noise", [ScaledBernoulli(), Gaussian()], ids=["Bernoulli", "Gaussian"])
def test_each_gradient_is_multiplied_by_the_mask_of_its_own_weight(noise: Any) -> None:
    """The loss is linear in the weights, so the gradient before masking is 1."""
    module = Toy(deep(), lambda p: torch.optim.SGD(p, 1e-3), loss=lambda out, _: sum(p.sum() for p in module.network.parameters()))
    callback, seen = AdaptiveMask(LOG_SUM, 3e-2, noise=noise, curvature=None), []

    def look(hook: str, _: Toy) -> None:
        if hook == "before backward":
            seen.append({name: parameter.detach().clone() for name, parameter in callback.parameters.items()})
        if hook == "after backward":
            seen[-1] = {
                name: (shown, callback.parameters[name].grad.clone(), callback.parameters[name].detach().clone())
                for name, shown in seen[-1].items()
            }

    trainer(callback, Spy(look), epochs=1).fit(module, batches())
    for batch in seen:
        for shown, mask, live in batch.values():
            torch.testing.assert_close(shown, live * mask)
            assert not torch.equal(mask, torch.ones_like(mask))


@pytest.mark.parametrize("manual", [False, True])
def test_memory_of_masks_is_used_again_unless_a_graph_may_still_need_it(manual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_sparse.elementwise.pieces.LARGE", 1)
    monkeypatch.setattr("lightning_sparse.elementwise.engine.DRAWN", 2)
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


def rows_of(optimizer: torch.optim.Optimizer) -> list[tuple[Any, Any, float, torch.Tensor]]:
    return [(optimizer.state.get(p, {}), group, 1.0, p) for group in optimizer.param_groups for p in group["params"]]


def test_weights_of_one_group_and_one_count_of_steps_share_a_step_size() -> None:
    """A weight added later has different bias corrections, and each group has its own rate."""
    own = [nn.Parameter(torch.zeros(2, 2)) for _ in range(6)]
    optimizer = torch.optim.Adam([{"params": own[:4]}, {"params": own[4:], "lr": 0.1}])
    for late in (1, 0):
        for parameter in own[late:]:
            parameter.grad = torch.ones(2, 2)
        optimizer.step()
    del optimizer.state[own[3]]
    groups = steps_of.by_step_size(rows_of(optimizer), "auto")
    assert [[number for w in group.columns[0] for number in range(6) if w is own[number]] for group in groups] == [[0], [1, 2], [3], [4, 5]]
    assert [len(group.columns) for group in groups] == [2, 2, 1, 2]


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
def test_columns_and_scalars_make_the_step_size_of_each_weight(make: Any) -> None:
    own = [nn.Parameter(torch.zeros(2, 2)) for _ in range(3)]
    optimizer = make(own)
    for scale in (4.0, 1.0):  # after the second step the largest moment is in the past
        for number, parameter in enumerate(own):
            parameter.grad = torch.full((2, 2), scale**number * (1 + number))
        optimizer.step()
    (group,) = steps_of.by_step_size(rows_of(optimizer), "auto")
    for w, *tensors in zip(*group.columns, strict=True):
        wanted = steps_of.read_step_size(optimizer, w, optimizer.param_groups[0], "auto")
        torch.testing.assert_close(torch.as_tensor(steps_of.step_size(*tensors, *group.scalars)), torch.as_tensor(wanted))


def test_a_strength_of_zero_masks_nothing() -> None:
    callback = AdaptiveMask(LOG_SUM, LinearWarmup(0.5, share=1.0), noise=ScaledBernoulli(), curvature=None)
    moved = Moved()
    trainer(callback, moved, epochs=1).fit(Toy(deep()), batches())
    assert [bool(names) for names in moved.seen] == [False, True, True, True]
