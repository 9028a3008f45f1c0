"""Dual ascent on log lam, against made-up networks whose density is known for every lam."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from lightning_sparse.ascent import RISE, ROUNDS, Ascent

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


def drive(ascent: Ascent, plant: Plant, first: int = 0, density: float = 1.0, last: int = ROUNDS) -> float:
    for at in range(first, last):
        density = plant(density, ascent.lam)
        ascent.climb(1 - density, (at + 1) / ROUNDS)
        if ascent.has_arrived(1 - density):
            break
    return density


@pytest.mark.parametrize("target", [0.5, 0.9, 0.98, 0.99])
@pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS.keys())
def test_the_target_is_reached_within_a_fifth_of_a_point(plant: Plant, target: float) -> None:
    assert drive(Ascent(target), plant) == pytest.approx(1 - target, abs=0.002)


def test_the_wanted_share_is_the_cubic_ramp() -> None:
    ascent = Ascent(0.9)
    ascent.climb(0.1, 0.0)
    for t in (0.0, 0.2, 0.5, 0.69):
        assert ascent.wanted(t) == pytest.approx(0.9 - 0.8 * (1 - t / RISE) ** 3)
    assert ascent.wanted(RISE) == ascent.wanted(1.0) == ascent.wanted(1.5) == 0.9


def test_lam_rises_while_too_few_are_zero_and_falls_while_too_many_are() -> None:
    ascent = Ascent(0.9, start=1e-3)
    assert ascent.lam == pytest.approx(1e-3)
    ascent.climb(0.1, 0.1)
    risen = ascent.lam
    assert risen > 1e-3
    ascent.climb(0.8, 0.11)
    assert ascent.lam < risen
    ascent.reset()
    assert ascent.lam == pytest.approx(1e-3)


def test_zeros_that_do_not_follow_end_the_run_before_its_ramp_does() -> None:
    ascent, seen = Ascent(0.98), []
    with pytest.raises(RuntimeError, match=r"target_sparsity=0.98 is out of reach: lam has risen from 1e-05 .* still only 10.00%"):
        drive(ascent, lambda density, lam: seen.append(lam) or 0.9)  # type: ignore[func-returns-value]
    assert len(seen) < RISE * ROUNDS


def test_an_interrupted_ascent_goes_on_exactly() -> None:
    whole, first, second = Ascent(0.95), Ascent(0.95), Ascent(0.95)
    density = drive(first, PLANTS["slow"], last=90)
    second.load_state_dict(first.state_dict())
    assert drive(second, PLANTS["slow"], first=90, density=density) == drive(whole, PLANTS["slow"])
    assert second.lam == whole.lam != Ascent(0.95).lam


@pytest.mark.parametrize(("target", "start", "said"), [(1.0, 1e-3, "target_sparsity must lie"), (0.0, 1e-3, "target"), (0.5, 0.0, "lam")])
def test_bad_arguments(target: float, start: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Ascent(target, start)
