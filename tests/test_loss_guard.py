"""LossGuard: a price falls while it drives the loss up, and rises back after."""

from __future__ import annotations

import math

import pytest

from lightning_sparse.loss_guard import ALL, LossGuard, is_state


def factors(losses, **given):
    guard, seen = LossGuard(**given), []
    for loss in losses:
        guard.observe(loss)
        seen.append(guard.factor)
    return seen


FALL = [2.3 * math.exp(-step / 30) for step in range(100)]


def test_a_falling_loss_does_not_change_the_price():
    assert factors(FALL) == [1.0] * 100


def test_a_rise_by_less_than_a_fifth_of_the_gain_is_allowed_and_a_longer_one_is_not():
    assert factors([*FALL, *[0.3] * 50])[-1] == 1.0
    assert factors([*FALL, *[1.0] * 50])[-1] < 0.01


def test_the_price_comes_back_once_the_loss_has_recovered():
    seen = factors([*FALL, *[1.0] * 20, *[0.1] * 150])
    assert min(seen) < 0.5
    assert seen[-1] == 1.0


def test_the_wide_slack_waits_until_all_is_lost():
    assert factors([*FALL, *[2.2] * 50], slack=ALL)[-1] == 1.0
    assert factors([*FALL, *[9.0] * 50], slack=ALL)[-1] < 0.01


def test_nonfinite_losses_are_left_out_and_the_state_continues():
    guard, other = LossGuard(), LossGuard()
    for loss in [*FALL, math.nan, math.inf, 1.0]:
        guard.observe(loss)
    state = guard.state_dict()
    assert is_state(state)
    assert not is_state({"factor": 1.0})
    other.load_state_dict(state)
    for one in (guard, other):
        one.observe(1.2)
    assert guard.state_dict() == other.state_dict()
    assert math.isfinite(guard.factor)
    assert guard.factor == pytest.approx(other.factor)
