"""Dual ascent on log lam, against made-up networks whose density is known for every lam."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from lightning_sparse.target import RISE, ROUNDS, TargetSparsity

Plant = Callable[[float, float], float]  # the density now, from that before and lam


def lagging(at: float, power: float, memory: int, regrows: bool = True) -> Plant:
    """log density goes towards min(0, -power * log(lam / at)) with a memory of so many rounds."""

    def after(density: float, lam: float) -> float:
        rest = min(0.0, -power * math.log(lam / at))
        moved = math.log(density) + (rest - math.log(density)) / memory
        return math.exp(moved if regrows else min(moved, math.log(density)))

    return after


PLANTS = {
    "quick": lagging(1e-5, 1.0, 2),
    "slow": lagging(1e-4, 1.0, 8),
    "flat": lagging(1e-5, 0.5, 4),
    "steep": lagging(1e-4, 2.0, 4),
    "far": lagging(1e-2, 1.0, 4),
}


def drive(ascent: TargetSparsity, plant: Plant, first: int = 0, density: float = 1.0, last: int = ROUNDS) -> float:
    """The density at the end, with what lacks removed by rank."""
    for at in range(first, last):
        density = plant(density, ascent.lam)
        ascent.climb(1 - density, (at + 1) / ROUNDS)
        density = min(density, 1 - ascent.least((at + 1) / ROUNDS))
        if ascent.has_arrived(1 - density):
            break
    return density


@pytest.mark.parametrize("target", [0.5, 0.9, 0.98, 0.99])
@pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS.keys())
def test_the_target_is_reached_within_a_fifth_of_a_point(plant: Plant, target: float) -> None:
    assert drive(TargetSparsity(target), plant) == pytest.approx(1 - target, abs=0.002)


@pytest.mark.parametrize("target", [0.9, 0.98, 0.99])
@pytest.mark.parametrize("name", ["quick", "slow", "flat", "steep"])
def test_lam_alone_reaches_it_where_the_zeros_follow(name: str, target: float) -> None:
    own = []
    drive(TargetSparsity(target), lambda density, lam: own.append(PLANTS[name](density, lam)) or own[-1])  # type: ignore[func-returns-value]
    assert own[-1] == pytest.approx(1 - target, abs=0.002)


def test_the_wanted_share_is_the_cubic_ramp() -> None:
    ascent = TargetSparsity(0.9)
    ascent.climb(0.1, 0.0)
    for t in (0.0, 0.2, 0.5, 0.69):
        assert ascent.wanted(t) == pytest.approx(0.9 - 0.8 * (1 - t / RISE) ** 3)
    assert ascent.wanted(RISE) == ascent.wanted(1.0) == ascent.wanted(1.5) == 0.9


def test_lam_rises_while_too_few_are_zero_and_falls_while_too_many_are() -> None:
    ascent = TargetSparsity(0.9, start=1e-3)
    assert ascent.lam == pytest.approx(1e-3)
    ascent.climb(0.1, 0.1)
    risen = ascent.lam
    assert risen > 1e-3
    ascent.climb(0.8, 0.11)
    assert ascent.lam < risen
    ascent.reset()
    assert ascent.lam == pytest.approx(1e-3)


def test_lam_stops_rising_where_the_zeros_do_not_follow_and_the_rank_takes_over() -> None:
    ascent, seen = TargetSparsity(0.98), []
    drive(ascent, lambda density, lam: seen.append(lam) or 0.9)  # type: ignore[func-returns-value]
    late = [lam for at, lam in enumerate(seen) if ascent.least(at / ROUNDS) > 0.1]
    assert len(late) > ROUNDS / 2
    assert max(late) == late[0] < 0.01


def test_lam_moves_by_no_more_than_weights_can_answer_to() -> None:
    ascent = TargetSparsity(0.98)
    before = ascent.log_lam
    for step in range(1, 23):
        ascent.climb(0.0, step / 22, way=22)
        assert abs(ascent.log_lam - before) <= 0.05 + 1e-12
        before = ascent.log_lam


def test_the_lower_bound_rises_late_and_ends_at_the_target() -> None:
    ascent = TargetSparsity(0.9)
    assert [ascent.least(t) for t in (0.0, 0.25, 0.6, 0.95, 1.0, 1.5)] == pytest.approx([0.0, 0.0, 0.7875, 0.9, 0.9, 0.9])
    ascent.climb(0.0, 0.0)
    assert all(ascent.least(at / 100) <= ascent.wanted(at / 100) for at in range(100))


def test_a_state_of_an_earlier_version_still_loads() -> None:
    ascent = TargetSparsity(0.9)
    ascent.load_state_dict({"log_lam": -5.0, "error": 0.1, "t": 0.3, "first": 0.0})
    assert (ascent.log_lam, ascent.wanted(0.9)) == (-5.0, 0.9)


def test_an_interrupted_ascent_goes_on_exactly() -> None:
    whole, first, second = TargetSparsity(0.95), TargetSparsity(0.95), TargetSparsity(0.95)
    density = drive(first, PLANTS["slow"], last=90)
    second.load_state_dict(first.state_dict())
    assert drive(second, PLANTS["slow"], first=90, density=density) == drive(whole, PLANTS["slow"])
    assert second.lam == whole.lam != TargetSparsity(0.95).lam


@pytest.mark.parametrize(("target", "start", "said"), [(1.0, 1e-3, "target_sparsity must lie"), (0.0, 1e-3, "target"), (0.5, 0.0, "lam")])
def test_bad_arguments(target: float, start: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TargetSparsity(target, start)
