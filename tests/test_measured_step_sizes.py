"""Step sizes of optimisers: read from torch's own, measured for all others."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sparse.conformance import optimizers, step_sizes
from lightning_sparse.optimizer import momentum_gain, momentum_memory, step_size_of
from lightning_sparse.step_sizes import Measured, StepSizes, is_readable, source, uniform_rate


def train(optimizer: Any, weights: list[nn.Parameter], steps: int, sizes: StepSizes | None = None, sign: float = 1.0) -> None:
    """Gradients of different sizes around a slow drift, as of batches."""
    generator = torch.Generator().manual_seed(0)
    group = optimizer.param_groups[0]
    scale = torch.logspace(-2, 0, weights[0].numel()).reshape(weights[0].shape)
    for _ in range(steps):
        for w in weights:
            w.grad = sign * scale * (0.3 * w.detach() + torch.randn(w.shape, generator=generator))
        if sizes is not None:
            sizes.before(optimizer, [(w, group, w.detach()) for w in weights])
        optimizer.step()
        if sizes is not None:
            sizes.after(optimizer, [(w, group) for w in weights])


def measured(make: Any, steps: int = 300, shape: tuple[int, ...] = (20, 30)) -> tuple[torch.optim.Optimizer, nn.Parameter, Tensor]:
    w = nn.Parameter(torch.zeros(shape))
    optimizer, sizes = make([w]), StepSizes()
    train(optimizer, [w], steps, sizes)
    state, group = sizes.of(optimizer, w, optimizer.param_groups[0])
    return optimizer, w, torch.as_tensor(step_size_of(state, group)).expand(shape)


def adams(steps: int = 300, shape: tuple[int, ...] = (20, 30)) -> Tensor:
    w = nn.Parameter(torch.zeros(shape))
    optimizer = torch.optim.Adam([w], 1e-2)
    train(optimizer, [w], steps)
    return torch.as_tensor(step_size_of(optimizer.state[w], optimizer.param_groups[0]))


@pytest.mark.parametrize("name", ["the count of steps in its group", "no betas in its group", "moments of other names"])
@pytest.mark.parametrize("steps", [1, 5, 300])
def test_a_measured_step_size_is_adams_where_the_optimizer_is_an_adam(name: str, steps: int) -> None:
    found = measured(step_sizes.FOREIGN[name], steps)[2]
    ratio = found / adams(steps)
    assert 0.6 < float(ratio.min()) <= float(ratio.max()) < 1.4


def test_large_weights_are_measured_on_a_sample() -> None:
    _, w, found = measured(step_sizes.GroupStep, 100, (100, 120))
    ratio = found / adams(100, (100, 120))
    assert 0.6 < float(ratio.min()) <= float(ratio.max()) < 1.4
    assert w.numel() > 4096


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_measured_step_size_is_one_number_where_steps_are_not_scaled(momentum: float) -> None:
    class Plain(step_sizes.Foreign):
        def move(self, w: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
            speed = state.setdefault("speed", torch.zeros_like(w)).mul_(momentum).add_(grad)
            w.sub_(group["lr"] * speed)

    found = measured(partial(Plain, lr=0.01, momentum=momentum))[2]
    assert float(found.min()) == float(found.max()) == pytest.approx(0.01 / (1 - momentum), rel=0.3)


def test_signs_move_a_weight_as_much_further_as_its_gradients_are_smaller() -> None:
    """Under noise of deviation s a sign follows a mean gradient of m by about m / s."""
    found = measured(step_sizes.Signs)[2].flatten()
    assert 30 < float(found[0] / found[-1]) < 300  # the deviations are 1 to 100


def test_a_learning_rate_that_falls_is_followed_at_once() -> None:
    w = nn.Parameter(torch.zeros(20, 30))
    optimizer, sizes = step_sizes.GroupStep([w]), StepSizes()
    train(optimizer, [w], 50, sizes)
    before = step_size_of(*sizes.of(optimizer, w, optimizer.param_groups[0]))
    optimizer.param_groups[0]["lr"] = 1e-3
    after = step_size_of(*sizes.of(optimizer, w, optimizer.param_groups[0]))
    torch.testing.assert_close(torch.as_tensor(after), torch.as_tensor(before) / 10)


READ = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "RMSprop": torch.optim.RMSprop,
    "Adagrad": torch.optim.Adagrad,
    "super().step()": optimizers.Super,
}


@pytest.mark.parametrize("make", READ.values(), ids=READ.keys())
def test_what_can_be_read_is_not_measured(make: Any) -> None:
    w = nn.Parameter(torch.zeros(3, 4))
    optimizer, sizes = make([w]), StepSizes()
    train(optimizer, [w], 3, sizes)
    state, group = sizes.of(optimizer, w, optimizer.param_groups[0])
    assert state is optimizer.state[w]
    assert group is optimizer.param_groups[0]
    assert sizes.state_dict({"w": w}) == {}


@pytest.mark.parametrize("make", [step_sizes.Slow, lambda p: optimizers.Holding(torch.optim.Adam(p, 1e-2))])
def test_the_optimizer_that_another_holds_is_read(make: Any) -> None:
    w = nn.Parameter(torch.zeros(3, 4))
    optimizer, sizes = make([w]), StepSizes()
    train(optimizer, [w], 3, sizes)
    assert source(optimizer, w, optimizer.param_groups[0])[0] is optimizer.inner
    assert sizes.of(optimizer, w, optimizer.param_groups[0]).state is optimizer.inner.state[w]
    assert sizes.state_dict({"w": w}) == {}


def test_a_subclass_with_a_step_of_its_own_is_not_read() -> None:
    assert not is_readable(step_sizes.OwnStep)
    assert is_readable(torch.optim.Adam)
    assert not is_readable(torch.optim.Adafactor)
    assert not is_readable(torch.optim.Rprop)
    found = measured(partial(step_sizes.OwnStep, lr=1e-2))[2]
    ratio = found / adams()
    assert 0.6 < float(ratio.min()) <= float(ratio.max()) < 1.4


def test_before_the_first_step_nothing_is_moved() -> None:
    w = nn.Parameter(torch.zeros(3, 4))
    for make in (step_sizes.NoRate, step_sizes.Signs, step_sizes.GroupStep):
        optimizer = make([w])
        state, group = StepSizes().of(optimizer, w, optimizer.param_groups[0])
        assert step_size_of(state, group) == 0
        assert momentum_gain(group) == momentum_memory(group) == 1


def test_steps_that_ignore_the_gradients_are_named_once() -> None:
    class Wandering(step_sizes.Foreign):
        def move(self, w: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
            w.add_(torch.randn(w.shape, generator=GENERATOR), alpha=group["lr"])

    GENERATOR = torch.Generator().manual_seed(1)
    w = nn.Parameter(torch.zeros(40, 30))
    optimizer, sizes, said = Wandering([w], lr=0.1), StepSizes(), []
    group = optimizer.param_groups[0]
    for _ in range(120):
        w.grad = torch.randn(w.shape, generator=GENERATOR)
        sizes.before(optimizer, [(w, group, w.detach())])
        optimizer.step()
        said.append(sizes.after(optimizer, [(w, group)]))
    named = [reason for reason in said if reason]
    assert len(named) == 1
    assert "the step size of Wandering is not known: its steps do not follow the gradients" in named[0]


def test_maximizing_turns_the_gradient() -> None:
    class Uphill(step_sizes.Foreign):
        def move(self, w: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
            w.add_(grad, alpha=group["lr"])

    w = nn.Parameter(torch.zeros(20, 30))
    optimizer, sizes = Uphill([w], lr=0.01, maximize=True), StepSizes()
    train(optimizer, [w], 20, sizes, sign=-1.0)
    assert step_size_of(*sizes.of(optimizer, w, optimizer.param_groups[0])) == pytest.approx(0.01, rel=1e-3)


def test_a_state_goes_on_where_it_was() -> None:
    w = nn.Parameter(torch.zeros(20, 30))
    optimizer, whole = step_sizes.GroupStep([w]), StepSizes()
    group = optimizer.param_groups[0]
    train(optimizer, [w], 5, whole)
    halves = StepSizes()
    halves.load_state_dict(whole.state_dict({"w": w}), {"w": w})
    for sizes in (whole, halves):
        sizes.before(optimizer, [(w, group, w.detach())])
    optimizer.step()
    for sizes in (whole, halves):
        sizes.after(optimizer, [(w, group)])
    kept, resumed = (sizes.state_dict({"w": w})["w"] for sizes in (whole, halves))
    assert all(torch.equal(value, resumed[key]) for key, value in kept.items())


def test_a_gradient_without_steps_is_no_measure() -> None:
    one, w = Measured(), torch.ones(5)
    one.before(w)
    one.after(w, torch.ones(5), {"lr": 0.0})
    assert one.steps == 0
    one.before(w)
    one.after(w, torch.ones(5), {"lr": 0.1})
    assert step_size_of(*one.rate({"lr": 0.1})) == 0


def test_sgd_alone_moves_all_weights_alike() -> None:
    w = [nn.Parameter(torch.zeros(2))]
    for optimizer, rate in ((torch.optim.SGD(w, 0.1, momentum=0.9), 1.0), (torch.optim.Adam(w, 0.1), 0.0)):
        assert uniform_rate(optimizer, optimizer.param_groups[0]) == pytest.approx(rate)
