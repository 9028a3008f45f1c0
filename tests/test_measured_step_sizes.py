"""Step sizes: read from the state of torch's optimisers, measured for all others."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sparse.conformance import optimizers, step_sizes
from lightning_sparse.optimizer import momentum_gain, momentum_memory, read_step_size, settling_steps, step_size_of
from lightning_sparse.penalties import LogSum
from lightning_sparse.proximal import in_zero_region
from lightning_sparse.step import uniform_rate
from lightning_sparse.step_sizes import Measured, StepSizes, is_readable, source


def train(optimizer: Any, weights: list[nn.Parameter], steps: int, sizes: StepSizes | None = None, sign: float = 1.0) -> None:
    """Train with gradients of different sizes around a slow drift, like those of batches."""
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


@pytest.mark.parametrize("divides", [False, True])
def test_a_measured_momentum_has_a_memory_where_steps_are_divided_by_the_gradients_size(divides: bool) -> None:
    """SGD's momentum is part of the measured rate. Momentum of steps that are divided by one size for all averages them."""

    class Momentum(step_sizes.Foreign):
        def move(self, w: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
            mean = state.setdefault("mean", torch.zeros_like(w)).mul_(group["momentum"]).add_(grad)
            w.sub_(group["lr"] * mean / (0.1 * float(grad.square().mean().sqrt()) if divides else 1.0))

    w = nn.Parameter(torch.zeros(20, 30))
    optimizer, sizes = Momentum([w], lr=1e-3, momentum=0.9), StepSizes()
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        w.grad = 1e-2 * (0.3 + torch.randn(w.shape, generator=generator))
        sizes.before(optimizer, [(w, optimizer.param_groups[0], w.detach())])
        optimizer.step()
        sizes.after(optimizer, [(w, optimizer.param_groups[0])])
    _, group = sizes.of(optimizer, w, optimizer.param_groups[0])
    assert momentum_memory(group) == pytest.approx(10 if divides else 1)


AT_REST = {
    "Adam": partial(torch.optim.Adam, lr=3e-3),
    "Adam without beta_1": partial(torch.optim.Adam, lr=3e-3, betas=(0.0, 0.999)),
    "RMSprop": partial(torch.optim.RMSprop, lr=3e-3, alpha=0.99),
}


def test_weights_at_rest_oscillate_alike_with_and_without_momentum_and_are_as_often_in_the_zero_region() -> None:
    penalty, lam, spreads, shares = LogSum(2.0), 3e-3, [], []
    for make in AT_REST.values():
        w, generator = nn.Parameter(torch.zeros(4000)), torch.Generator().manual_seed(0)
        optimizer = make([w])
        for _ in range(1000):
            w.grad = 4e-3 * torch.randn(w.shape, generator=generator) + lam * penalty.gradient(w.detach())
            optimizer.step()
        group = optimizer.param_groups[0]
        reach = settling_steps(group, scaled=True)
        at_rest = in_zero_region(penalty, w.detach(), read_step_size(optimizer, w, group), lam, reach)
        spreads.append(float(w.detach().std()))
        shares.append(float(at_rest.float().mean()))
    assert max(spreads) < 1.25 * min(spreads)
    assert min(shares) > 0.5
    assert max(shares) < 1.25 * min(shares)


def test_steps_that_are_not_scaled_reach_as_far_as_their_momentum() -> None:
    assert settling_steps({"lr": 0.1}, scaled=False) == 1
    assert settling_steps({"lr": 0.1, "momentum": 0.8, "dampening": 0.0}, scaled=False) == pytest.approx(5)
    assert settling_steps({"lr": 0.1, "betas": (0.98, 0.999)}, scaled=True) == pytest.approx(50)


def test_signs_move_a_weight_as_much_further_as_its_gradients_are_smaller() -> None:
    """Under noise of standard deviation s, the mean sign of a gradient with mean m is about m / s."""
    found = measured(step_sizes.Signs)[2].flatten()
    assert 30 < float(found[0] / found[-1]) < 300  # standard deviations from 1 to 100


def test_a_learning_rate_that_falls_is_followed_at_once() -> None:
    w = nn.Parameter(torch.zeros(20, 30))
    optimizer, sizes = step_sizes.GroupStep([w]), StepSizes()
    train(optimizer, [w], 50, sizes)
    before = step_size_of(*sizes.of(optimizer, w, optimizer.param_groups[0]))
    optimizer.param_groups[0]["lr"] = 1e-3
    after = step_size_of(*sizes.of(optimizer, w, optimizer.param_groups[0]))
    torch.testing.assert_close(torch.as_tensor(after), torch.as_tensor(before) / 10)


class Orthogonal(step_sizes.Foreign):
    """Step by the orthogonal matrix nearest to the mean gradient, like Muon: equal in directions of large and small gradients."""

    def move(self, w: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        mean = state.setdefault("mean", torch.zeros_like(w)).lerp_(grad, 1 - group["momentum"])
        left, _, right = torch.linalg.svd(mean, full_matrices=False)
        w.sub_(group["lr"] * left @ right)


def low_rank_gradients(steps: int, shape: tuple[int, int] = (20, 30)) -> list[Tensor]:
    """Draw gradients that are large in a few directions, with small noise in all."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.randn(shape[0], 2, generator=generator), torch.randn(2, shape[1], generator=generator)
    draws = [(torch.randn(2, generator=generator), torch.randn(shape, generator=generator)) for _ in range(steps)]
    return [(rows * size) @ columns + 0.1 * noise for size, noise in draws]


def moved(make: Any, gradients: list[Tensor], added: Tensor, last: int = 100) -> float:
    """Measure the mean step per unit of ``added``: compare runs with +added and -added in the last steps."""
    ends = []
    for sign in (1, -1):
        w = nn.Parameter(torch.zeros_like(added))
        optimizer = make([w])
        for index, grad in enumerate(gradients):
            w.grad = grad + sign * added * (index >= len(gradients) - last)
            optimizer.step()
        ends.append(w.detach())
    return float(((ends[1] - ends[0]) * added).sum() / (2 * last * added.square().sum()))


MAKES = {
    "orthogonal": partial(Orthogonal, lr=0.01, momentum=0.9),
    "Adam's": step_sizes.GroupStep,
    "factored": step_sizes.NoRate,
}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())
def test_a_gradient_that_is_added_moves_a_weight_as_far_as_is_measured(make: Any) -> None:
    gradients = low_rank_gradients(200)
    added = 0.005 * torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    w, sizes = nn.Parameter(torch.zeros(20, 30)), StepSizes()
    optimizer = make([w])
    for grad in gradients:
        w.grad = grad.clone()
        sizes.before(optimizer, [(w, optimizer.param_groups[0], w.detach())])
        optimizer.step()
        sizes.after(optimizer, [(w, optimizer.param_groups[0])])
    true = moved(make, gradients, added)
    rates = [step_size_of(*sizes.of(optimizer, w, optimizer.param_groups[0], added=one)) for one in (True, False)]
    found, regression = (float((rate * added.square()).sum() / added.square().sum()) for rate in rates)
    assert 1 / 3.5 < found / true < 1.5
    assert regression <= found  # which follows the directions of large gradients


READ = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "RMSprop": torch.optim.RMSprop,
    "Adagrad": torch.optim.Adagrad,
    "super().step()": optimizers.SuperStep,
}


@pytest.mark.parametrize("make", READ.values(), ids=READ.keys())
def test_readable_optimiser_states_are_not_measured(make: Any) -> None:
    w = nn.Parameter(torch.zeros(3, 4))
    optimizer, sizes = make([w]), StepSizes()
    train(optimizer, [w], 3, sizes)
    state, group = sizes.of(optimizer, w, optimizer.param_groups[0])
    assert state is optimizer.state[w]
    assert group is optimizer.param_groups[0]
    assert sizes.state_dict({"w": w}) == {}


@pytest.mark.parametrize("make", [step_sizes.Slow, lambda p: optimizers.Wrapper(torch.optim.Adam(p, 1e-2))])
def test_the_optimizer_that_another_holds_is_read(make: Any) -> None:
    w = nn.Parameter(torch.zeros(3, 4))
    optimizer, sizes = make([w]), StepSizes()
    train(optimizer, [w], 3, sizes)
    assert source(optimizer, w, optimizer.param_groups[0])[0] is optimizer.inner
    assert sizes.of(optimizer, w, optimizer.param_groups[0]).state is optimizer.inner.state[w]
    assert sizes.state_dict({"w": w}) == {}


def test_the_state_of_a_subclass_with_its_own_step_is_not_read() -> None:
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
    named = [doubt for doubt in said if doubt is not None]
    assert len(named) == 1
    assert "the step size of Wandering is not known: its steps do not follow its gradients" in named[0].reason


def test_maximizing_turns_the_gradient() -> None:
    class Uphill(step_sizes.Foreign):
        def move(self, w: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
            w.add_(grad, alpha=group["lr"])

    w = nn.Parameter(torch.zeros(20, 30))
    optimizer, sizes = Uphill([w], lr=0.01, maximize=True), StepSizes()
    train(optimizer, [w], 20, sizes, sign=-1.0)
    assert step_size_of(*sizes.of(optimizer, w, optimizer.param_groups[0])) == pytest.approx(0.01, rel=1e-3)


def test_a_state_continues_after_loading() -> None:
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


def test_a_gradient_without_steps_gives_no_measurement() -> None:
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
