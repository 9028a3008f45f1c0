"""The lam that a ramp to a target solves for, with networks whose share of zeros is a known function of lam."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from lightning_sparse.schedules import RISE, ROUNDS, START, TargetSparsity

Plant = Callable[[float], float]  # share of zeros at a lam, at fixed weights


def plant(sizes: torch.Tensor, tol: float = 0.05) -> Plant:
    """Return the share of weights of these sizes whose keep probability under an L1 penalty is below ``tol``."""
    return lambda lam: float((1 / (1 + lam / sizes) < tol).float().mean())


SIZES = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).abs() * 0.05
PLANTS = {
    "normal": plant(SIZES),
    "tiny": plant(SIZES * 1e-4),
    "huge": plant(SIZES * 1e3),
    "log-uniform": plant(10 ** (-6 * torch.rand(20_000, generator=torch.Generator().manual_seed(1)))),
}


def drive(target: TargetSparsity, share: Plant, most: float = 1e9, first: int = 0, last: int = ROUNDS) -> list[tuple[float, float]]:
    """Follow the ramp, and return (wanted share, share at the solution) of each point."""
    seen = []
    for at in range(first, last):
        wanted = target.advance(share(target.lam), (at + 1) / ROUNDS)
        target.solve(lambda: share(target.lam), most)
        seen.append((wanted, share(target.lam)))
    return seen


@pytest.mark.parametrize("goal", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("share", PLANTS.values(), ids=PLANTS.keys())
def test_lam_gives_the_ramps_share_at_every_point(share: Plant, goal: float) -> None:
    seen = drive(TargetSparsity(goal), share)
    late = seen[ROUNDS // 4 :]  # the first solution may have been too far for a few steps
    assert max(abs(found - wanted) for wanted, found in late) < 0.03
    assert seen[-1][1] == pytest.approx(goal, abs=0.01)


def test_lam_never_exceeds_its_bound_however_few_weights_are_zero() -> None:
    target, seen = TargetSparsity(0.98), []
    for at in range(ROUNDS):
        target.advance(0.0, (at + 1) / ROUNDS)
        target.solve(lambda: seen.append(target.lam) or 0.0, most=0.37)  # type: ignore[func-returns-value]
    assert max(seen) == pytest.approx(0.37)
    assert target.lam == pytest.approx(0.37)


def test_it_does_not_swing_when_weights_answer_late() -> None:
    """Weights shrink with a lag that makes an ascent on lam overshoot, and grow again when lam falls."""
    target, scale, lams = TargetSparsity(0.9), 1.0, []
    for at in range(ROUNDS):
        scale = max(scale * math.exp(0.2 * (1 - 30 * target.lam)), 1e-3)  # the weights' common size
        share = plant(SIZES * scale)
        target.advance(share(target.lam), (at + 1) / ROUNDS)
        target.solve(lambda share=share: share(target.lam), most=0.1)  # type: ignore[misc]
        lams.append(target.lam)
    turns = sum((b - a) * (c - b) < 0 and max(a, b, c) > 3 * min(a, b, c) for a, b, c in zip(lams, lams[1:], lams[2:], strict=False))
    assert turns <= 2
    assert max(lams) <= 0.1 * (1 + 1e-12)


def test_lam_moves_by_a_limited_factor_after_the_first_solution() -> None:
    target = TargetSparsity(0.9)
    drive(target, PLANTS["normal"], last=10)
    before = target.lam
    target.solve(lambda: 0.0, most=1e9)
    assert target.lam == pytest.approx(2 * before)
    target.solve(lambda: 1.0, most=1e9)
    target.solve(lambda: 1.0, most=1e9)
    assert target.lam <= before


def test_a_given_lam_is_where_the_search_starts_and_without_one_the_first_solution_is_taken() -> None:
    told, free = TargetSparsity(0.9, start=1e-7), TargetSparsity(0.9)
    assert (told.lam, free.lam) == (pytest.approx(1e-7), pytest.approx(START))
    for one in (told, free):
        one.advance(0.0, 0.1)
        one.solve(lambda: 0.0, most=0.5)
    assert told.lam == pytest.approx(2e-7)
    assert free.lam == pytest.approx(0.5)
    free.reset()
    assert free.lam == pytest.approx(START)


def test_an_unknown_bound_leaves_lam_as_it_is() -> None:
    target = TargetSparsity(0.9)
    target.advance(0.0, 0.5)
    for most in (math.inf, 0.0, math.nan):
        target.solve(lambda: 0.0, most)
        assert target.lam == pytest.approx(START)


def test_the_wanted_share_is_the_cubic_ramp() -> None:
    target = TargetSparsity(0.9)
    target.advance(0.1, 0.0)
    for t in (0.0, 0.2, 0.5, 0.69):
        assert target.wanted(t) == pytest.approx(0.9 - 0.8 * (1 - t / RISE) ** 3)
    assert target.wanted(RISE) == target.wanted(1.0) == target.wanted(1.5) == 0.9


def test_the_gradients_mean_square_forgets_the_past_and_ignores_infinite_ones() -> None:
    target = TargetSparsity(0.9)
    for square in (4.0, math.inf, math.nan, 4.0):
        target.observe_gradients(square)
    assert target.gradient == pytest.approx(4.0)
    for _ in range(100):
        target.observe_gradients(1.0)
    assert target.gradient == pytest.approx(1.0, rel=1e-3)


def test_a_state_of_an_earlier_version_still_loads() -> None:
    target = TargetSparsity(0.9)
    target.load_state_dict({"log_lam": -5.0, "error": 0.1, "t": 0.3, "calm": 0.5, "ranked": 0.1, "first": 0.0})
    assert (target.log_lam, target.wanted(1.0), target.ranked) == (-5.0, 0.9, 0.1)


def test_an_interrupted_search_goes_on_exactly() -> None:
    whole, first, second = TargetSparsity(0.95), TargetSparsity(0.95), TargetSparsity(0.95)
    drive(first, PLANTS["normal"], last=40)
    second.load_state_dict(first.state_dict())
    assert drive(second, PLANTS["normal"], first=40) == drive(whole, PLANTS["normal"])[40:]
    assert second.lam == whole.lam != TargetSparsity(0.95).lam


@pytest.mark.parametrize(("target", "start", "said"), [(1.0, 1e-3, "target_sparsity must lie"), (0.0, 1e-3, "target"), (0.5, 0.0, "lam")])
def test_bad_arguments(target: float, start: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TargetSparsity(target, start)


def test_a_start_above_the_bound_is_lowered_to_the_smallest_bound_of_several_optimisers():
    search = TargetSparsity(0.5, start=10.0)
    for most, wanted in ((0.5, 0.5), (2.0, 0.5), (0.1, 0.1), (math.inf, 0.1)):
        search.begin_below(most)
        assert search.lam == pytest.approx(wanted)
