"""Functions called around an optimiser's steps, once per outer step and removed completely; and lam in force."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from functools import partial

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR

from lightning_sparse import step as steps
from lightning_sparse.conformance.optimizers import super_step, wrapped_step
from lightning_sparse.schedules import Constant, LinearWarmup


def weight() -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    return parameter


MAKES = {"Adam": torch.optim.Adam, "super().step()": super_step, "holding": wrapped_step}
MAKES |= {"fused": partial(torch.optim.SGD, lr=0.1, fused=True)}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())
def test_hooks_run_once_around_each_step(make):
    parameter, seen = weight(), []
    optimizer = make([parameter])
    look = lambda when: lambda one: seen.append((when, one is optimizer, bool((parameter == 1).all())))  # noqa: E731
    handle = steps.around(optimizer, look("before"), look("after"))
    optimizer.step()
    assert seen == [("before", True, True), ("after", True, False)]
    handle.remove()
    handle.remove()
    optimizer.step()
    assert len(seen) == 2
    assert "step" not in vars(optimizer)


def test_two_callers_share_an_optimiser_in_any_order_of_leaving():
    for first in (0, 1):
        optimizer, seen = torch.optim.SGD([weight()], 0.1), []
        handles = [steps.around(optimizer, None, lambda _, i=i, seen=seen: seen.append(i)) for i in range(2)]
        optimizer.step()
        handles[first].remove()
        optimizer.step()
        handles[1 - first].remove()
        optimizer.step()
        assert seen == [0, 1, 1 - first]
        assert "step" not in vars(optimizer)


def test_schedulers_made_before_and_after_find_the_step_that_they_mark():
    optimizer, seen = torch.optim.SGD([weight()], 0.1), []
    before = ConstantLR(optimizer)
    marked = vars(optimizer)["step"]
    handle = steps.around(optimizer, None, seen.append)
    after = ConstantLR(optimizer)
    optimizer.step()
    before.step()  # warns if its mark is missing
    after.step()
    assert seen == [optimizer]
    handle.remove()
    assert vars(optimizer)["step"] is marked


def test_later_wrappers_of_step_keep_the_hooks():
    optimizer, seen = torch.optim.SGD([weight()], 0.1), []
    handle = steps.around(optimizer, None, seen.append)
    scheduler = ConstantLR(optimizer)
    handle.remove()
    optimizer.step()
    assert seen == []
    again = steps.around(optimizer, None, seen.append)
    optimizer.step()
    scheduler.step()
    assert seen == [optimizer]
    again.remove()
    optimizer.step()
    assert seen == [optimizer]


def test_a_step_that_raises_ends_without_its_hook_and_the_next_has_it():
    optimizer, seen = torch.optim.SGD([weight()], 0.1), []
    steps.around(optimizer, None, seen.append)

    def closure():
        raise KeyError

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert seen == []
    optimizer.step()
    assert seen == [optimizer]


def test_the_signature_is_the_optimisers_own_as_grad_scaler_reads_it():
    class Scaling(torch.optim.SGD):
        def step(self, closure=None, *, grad_scaler=None):
            return super().step(closure)

    optimizer = Scaling([weight()], 0.1)
    wanted = inspect.signature(optimizer.step)
    steps.around(optimizer)
    assert inspect.signature(optimizer.step) == wanted


def test_a_copy_of_an_optimiser_steps_itself_and_calls_no_hook():
    optimizer, seen = torch.optim.SGD([weight()], 0.1), []
    steps.around(optimizer, None, seen.append)
    twin = copy.deepcopy(optimizer)
    (copied,) = twin.param_groups[0]["params"]
    copied.grad = torch.ones(2)
    twin.step()
    assert seen == []
    assert torch.equal(twin.param_groups[0]["params"][0], torch.full((2,), 0.9))
    assert torch.equal(optimizer.param_groups[0]["params"][0], torch.ones(2))


def test_an_optimiser_is_freed_after_its_hooks_are_removed():
    optimizer = torch.optim.SGD([weight()], 0.1)
    steps.around(optimizer).remove()
    known = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert known() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("schedule", "half_way"), [(Constant(2.0), 2.0), (LinearWarmup(2.0, 1.0), 1.0)], ids=repr)
def test_lam_in_force_is_the_schedules_times_the_factor_and_not_below_the_bound(schedule, half_way):
    strength = steps.Strength(schedule)
    strength.factor = 0.5
    assert strength.lam == 1.0  # before a fit the final one
    strength.step, strength.total = 5, 10
    assert strength.lam == 0.5 * half_way
    strength.least = 3.0
    assert strength.lam == 1.5
    strength.reset()
    assert strength.lam == 2.0
