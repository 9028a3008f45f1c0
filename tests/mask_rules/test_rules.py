"""Mask rules: their penalties in closed form, ties, precision near 0 and arguments."""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import pytest
import torch

from lightning_sparse import duality
from lightning_sparse.duality import CallableRule, RulePenalty
from lightning_sparse.mask_rules import LinearRamp, Standout, TargetedDropout, TopK
from lightning_sparse.penalties import MCP

W = torch.logspace(-4, 2, 61, dtype=torch.float64)


@pytest.mark.parametrize("rule", [Standout(), Standout(3.0, -1.0), Standout(0.2, 4.0), LinearRamp(1.0), LinearRamp(0.3)], ids=repr)
def test_the_closed_penalty_is_the_integral_of_the_rule(rule: Standout | LinearRamp) -> None:
    integral = RulePenalty(CallableRule(rule.keep_probability))
    torch.testing.assert_close(rule.to_penalty().omega(W), integral.omega(W), rtol=3e-6, atol=1e-14)


@pytest.mark.parametrize("w", ["1e-6", "1e-3", "0.1", "0.49", "0.51", "3", "40"])
def test_standout_to_all_digits(w: str) -> None:
    with mpmath.workdps(40):
        x = mpmath.mpf(w)
        omega = float(1 - (1 + x) * mpmath.exp(-x))
        dual = float(2 - (x**2 + 2 * x + 2) * mpmath.exp(-x))
    penalty = Standout().to_penalty()
    assert float(penalty.omega(torch.tensor(float(w), dtype=torch.float64))) == pytest.approx(omega, rel=1e-12)
    assert float(penalty.omega(torch.tensor(float(w)))) == pytest.approx(omega, rel=2e-6)
    eta = torch.tensor(float(mpmath.exp(x)), dtype=torch.float64)
    assert float(penalty.dual(eta)) == pytest.approx(dual, rel=1e-6, abs=1e-17)


def test_the_ramp_is_tau_times_mcp() -> None:
    penalty = LinearRamp(0.3).to_penalty()
    torch.testing.assert_close(penalty.omega(W), 0.3 * MCP(0.3).omega(W))
    torch.testing.assert_close(penalty.eta_hat(W), MCP(0.3).eta_hat(W) / 0.3)


def test_top_k_keeps_k_whatever_the_ties() -> None:
    w = torch.tensor([[1.0, -2.0, 2.0, 0.5], [2.0, 0.0, -1.0, 2.0]])
    assert TopK(0.5).keep_probability(w).tolist() == [[0, 1, 1, 0], [1, 0, 0, 1]]
    assert TopK(0.25).keep_probability(w).tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]  # the first of four equal weights
    assert TopK(0.01).keep_probability(w).sum() == 1
    assert TopK(1.0).keep_probability(w).min() == 1
    assert TopK(0.5).keep_probability(torch.zeros(0)).shape == (0,)


def test_the_penalty_of_top_k_is_an_indicator() -> None:
    w = torch.tensor([3.0, -1.0, 0.0, 0.2])
    penalty = TopK(0.5).to_penalty()
    assert penalty.omega(w).tolist() == [0, 0, 0, torch.inf]
    assert penalty.prox(w, 0.1).tolist() == [3.0, -1.0, 0.0, 0.0]
    assert penalty.omega(penalty.prox(w, 0.1)).sum() == 0
    assert penalty.dual(torch.tensor([1.0, 2.0, 0.0, 0.0])) == 0
    assert penalty.dual(torch.tensor([1.0, 2.0, 3.0, 0.0])) == torch.inf


def test_targeted_dropout_drops_among_the_smallest() -> None:
    w = torch.tensor([3.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    rule = TargetedDropout(rate=0.2, fraction=0.5)
    assert rule.keep_probability(w).tolist() == [1, 0.8, 0.8, 1]
    penalty = rule.to_penalty()
    assert penalty.omega(w).tolist() == [0, 0.125, 0.03125, 0]  # (r / (1 - r)) w^2 / 2
    torch.testing.assert_close(penalty.eta_hat(w), duality.eta(rule.keep_probability(w), 1.0))
    assert float(duality.gap(penalty, w, penalty.eta_hat(w))) == pytest.approx(0, abs=1e-15)
    assert penalty.dual(torch.full((4,), 8.1)) == torch.inf
    assert penalty.dual(torch.full((4,), 8.0)) == 0


def test_targeted_dropouts_prox_is_below_random_points() -> None:
    penalty, w = TargetedDropout(0.5, 0.5).to_penalty(), torch.tensor([1.0, -1.1, 0.9, 2.0], dtype=torch.float64)

    def cost(x: torch.Tensor) -> float:
        return float(((x - w) ** 2 / 2 + 0.7 * penalty.omega(x)).sum())

    generator = torch.Generator().manual_seed(0)
    others = w * torch.rand(600, 4, dtype=torch.float64, generator=generator)
    assert cost(penalty.prox(w, 0.7)) <= min(cost(x) for x in others)


BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: Standout(a=0.0), ValueError, "a must be a finite number > 0"),
    (lambda: Standout(b=float("nan")), ValueError, r"b must lie in \[-50, 50\], got nan"),
    (lambda: LinearRamp(0.0), ValueError, "tau must be a finite number > 0"),
    (lambda: TargetedDropout(1.0, 0.5), ValueError, r"rate must lie in \(0, 1\), got 1"),
    (lambda: TargetedDropout(0.5, 0.0), ValueError, r"fraction must lie in \(0, 1\], got 0"),
    (lambda: TopK(0.0), ValueError, r"density must lie in \(0, 1\], got 0"),
    (lambda: TopK(True), TypeError, "density must be a number"),
]


@pytest.mark.parametrize(("make", "error", "reason"), BAD)
def test_an_invalid_argument_raises_a_clear_error(make: Callable[[], object], error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        make()
