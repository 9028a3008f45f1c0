"""Schedules of lam by steps."""

from __future__ import annotations

import pytest

from lightning_sparse import schedules


def test_schedules_rise_to_lam_and_stay():
    for schedule in (schedules.LinearWarmup(2.0, 0.5), schedules.Cubic(2.0, 0.1, 0.6)):
        values = [schedule(step, 100) for step in range(101)]
        assert values == sorted(values)
        assert (values[0], values[-1], values[60]) == (0.0, 2.0, 2.0)
    assert schedules.LinearWarmup(2.0, 0.5)(25, 100) == 1.0
    # a cubic ramp reaches 1 - (1/2)^3 of the target at half time
    assert schedules.Cubic(2.0, 0.1, 0.6)(35, 100) == pytest.approx(2 * 7 / 8)
    assert schedules.Constant(2.0)(0, float("inf")) == 2.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.Constant(0.0), "lam must be a finite number > 0, got 0.0"),
        (lambda: schedules.Constant(float("nan")), "lam must be a finite number > 0, got nan"),
        (lambda: schedules.LinearWarmup(1.0, 0.0), r"share must lie in \(0, 1\], got 0.0"),
        (lambda: schedules.Cubic(1.0, 0.5, 0.5), r"end must lie in \(0.5, 1\], got 0.5"),
    ],
)
def test_bad_schedules(make, message):
    with pytest.raises(ValueError, match=message):
        make()
