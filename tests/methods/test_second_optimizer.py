"""Second optimiser: same class and settings as the user's, its current learning rate, no shared state."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from lightning_sparse.conformance.optimizers import super_step, wrapped_step
from lightning_sparse.methods.learned_parameters import SecondOptimizer, Share, reference
from lightning_sparse.methods.optimizer_like import innermost

MAKES = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": partial(torch.optim.Adam, lr=0.1, betas=(0.8, 0.9)),
    "AdamW": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5, amsgrad=True),
    "fused": partial(torch.optim.Adam, lr=0.1, fused=True),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.1, centered=True),
    "Adagrad, whose state is made before its first step": partial(torch.optim.Adagrad, lr=0.1, initial_accumulator_value=0.5),
    "NAdam": partial(torch.optim.NAdam, lr=0.1),
    "super().step()": super_step,
    "held": wrapped_step,
}


def pair(make, shape=(2, 3)):
    """Make a weight with its optimiser, and an equal parameter with the second optimiser."""
    weight, parameter = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
    first = make([weight])
    return first, weight, parameter, SecondOptimizer(first, [Share(0, 1.0, [weight], [parameter])])


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())
def test_it_moves_a_parameter_as_the_first_moves_its_weight_but_for_decay(make):
    first, weight, parameter, second = pair(make)
    for group in first.param_groups:
        group |= {"weight_decay": 0.0} if "weight_decay" in group else {}
    for step in range(4):
        weight.grad, parameter.grad = (torch.full_like(weight, 1.0 + step) for _ in range(2))
        first.param_groups[0]["lr"] = 0.1 / (step + 1)  # set by a scheduler
        second.follow()
        first.step()
        second.step()
        assert torch.equal(parameter, weight)
    assert (parameter != 1).all()
    assert [len(group["params"]) for group in first.param_groups] == [1]


class Sums(torch.optim.SGD):
    """An optimiser that keeps a running sum in its group and changes it in place, like Prodigy."""

    def step(self, closure=None):
        for group in self.param_groups:
            group.setdefault("sum", torch.zeros(1)).add_(sum(p.grad.sum() for p in group["params"]))
        return super().step(closure)


def test_running_sums_in_the_users_groups_are_not_changed():
    first, weight, parameter, second = pair(partial(Sums, lr=0.1))
    for _ in range(3):
        weight.grad, parameter.grad = torch.ones(2, 3), torch.full((2, 3), 100.0)
        second.follow()
        first.step()
        second.step()
    assert float(first.param_groups[0]["sum"]) == 3 * 6


def test_the_ratio_scales_the_rate_and_decay_is_left_out():
    first, weight, parameter, _ = pair(MAKES["AdamW"])
    second = SecondOptimizer(first, [Share(0, 5.0, [weight], [parameter])])
    (group,) = second.groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.5, 0.0, (0.9, 0.999))
    first.param_groups[0] |= {"lr": 0.2, "betas": (0.5, 0.6)}
    second.follow()
    assert (group["lr"], group["betas"]) == (1.0, (0.5, 0.6))


class Odd(torch.optim.SGD):
    """An optimiser with a custom constructor that stores its arguments under other names."""

    def __init__(self, params, strength_of_mine):
        super().__init__(params, lr=0.1)
        self.kept, self.turns = strength_of_mine, [0]

    def step(self, closure=None):
        self.turns.append(1)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(self.kept)
        return super().step(closure)


def test_an_optimiser_that_is_made_in_a_way_of_its_own_is_copied_without_its_state():
    first, weight, parameter, second = pair(lambda given: Odd(given, 3.0))
    weight.grad = parameter.grad = None
    for tensor, step in ((parameter, second.step), (weight, first.step)):
        tensor.grad = torch.ones_like(tensor)
        step()
        torch.testing.assert_close(tensor.detach(), torch.full((2, 3), 0.7))
    assert first.turns == [0, 1]


class Several(torch.optim.Optimizer):
    """A wrapper with a list of one optimiser per parameter."""

    def __init__(self, params):
        given = [*params]
        self.parts = [torch.optim.SGD([given[0]], 0.1), torch.optim.Adam(given[1:], 0.1)]
        super().__init__(given, {"lr": 0.1})

    def step(self, closure=None):
        for part in self.parts:
            part.step()


def test_the_innermost_optimiser_of_each_weight_is_found_and_the_users_is_not_stepped():
    weights, parameters = ([nn.Parameter(torch.ones(2)) for _ in range(2)] for _ in range(2))
    first = Several(weights)
    assert [type(innermost(first, w)).__name__ for w in weights] == ["SGD", "Adam"]
    second = SecondOptimizer(first, [Share(0, 1.0, [w], [p]) for w, p in zip(weights, parameters, strict=True)])
    for tensor in weights + parameters:
        tensor.grad = torch.full_like(tensor, 4.0)
    second.step()
    assert all(bool((w == 1).all()) for w in weights)
    torch.testing.assert_close([p.detach() for p in parameters], [torch.full((2,), 0.6), torch.full((2,), 0.9)])


@pytest.mark.parametrize("name", ["Adam", "fused", "SGD"])
def test_moments_are_given_back_as_they_were(name):
    ends = []
    for carried in (False, True):
        first, _, parameter, second = pair(MAKES[name])
        for step in range(4):
            if carried and step == 2:
                kept = second.moments(parameter)
                second = SecondOptimizer(first, [Share(0, 1.0, [first.param_groups[0]["params"][0]], [parameter])])
                second.restore_moments(parameter, kept)
            parameter.grad = torch.full_like(parameter, 1.0 + step)
            second.step()
        ends.append(parameter.detach())
    assert torch.equal(*ends)


def test_gradients_under_the_scale_of_a_fused_step_are_divided_by_it_and_the_scale_goes_again():
    first, _, parameter, second = pair(MAKES["fused"])
    parameter.grad = torch.full_like(parameter, 256.0)
    first.grad_scale, first.found_inf = torch.tensor(256.0), torch.tensor(0.0)
    second.step()
    moment = second.moments(parameter)["exp_avg"]
    torch.testing.assert_close(moment, torch.full_like(moment, 0.1))
    assert not any("grad_scale" in vars(part) for part, _ in second._parts)


RATES = [({"lr": 0.1, "initial_lr": 0.2}, 0.2), ({"lr": 0.1, "max_lr": 0.3}, 0.3), ({"lr": None}, 0.0), ({}, 0.0)]


@pytest.mark.parametrize(("group", "rate"), RATES)
def test_the_rate_that_a_schedule_is_a_share_of(group, rate):
    assert reference(group) == rate


class NeedsClosure(torch.optim.SGD):
    """An optimiser that requires a closure."""

    def step(self, closure):
        return super().step(closure)


def test_an_optimiser_whose_step_needs_a_closure_is_given_one():
    _, _, parameter, second = pair(partial(NeedsClosure, lr=0.1))
    parameter.grad = torch.ones_like(parameter)
    second.step()
    torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, 0.9))
