"""Properties of single penalties beyond the contract: precision near 0, relations, arguments."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import pytest
import torch

from lightning_sparse import duality, penalties
from lightning_sparse.duality import Penalty

TINY = torch.tensor([1e-6], dtype=torch.float64)


def test_near_zero_no_digits_cancel() -> None:
    """Compares omega at 1e-6 with a 40-digit value."""
    with mpmath.workdps(40):
        w, two = mpmath.mpf("1e-6"), mpmath.mpf(2)
        wanted = {
            penalties.LogSum(2.0): mpmath.log((w + 2) / 2),
            penalties.LogSquare(1.0): mpmath.log(w**2 + 1),
            penalties.VariationalDropout("empirical_bayes"): mpmath.asinh(w / 2) + (1 - mpmath.exp(-2 * mpmath.asinh(w / 2))) / 2,
            penalties.MCP(3.0): w - w**2 / 6,
            penalties.Lp(1.5): w ** (3 / two) / (3 / two),
        }
    for penalty, value in wanted.items():
        assert float(penalty.omega(TINY)) == pytest.approx(float(value), rel=1e-13)
        single = float(penalty.omega(TINY.float()))
        assert single == pytest.approx(float(value), rel=1e-6)


@pytest.mark.parametrize(
    "penalty", [penalties.LogSum(2.0), penalties.LogSquare(0.5), penalties.VariationalDropout("empirical_bayes")], ids=repr
)
def test_the_dual_near_its_start(penalty: Penalty) -> None:
    """Compares f(eta_hat(w)) for small w with 2 omega(w) - w^2 / eta_hat(w) in 40 digits."""
    w = mpmath.mpf("1e-4")
    with mpmath.workdps(40):
        if isinstance(penalty, penalties.LogSum):
            eta, omega = w * (w + 2), mpmath.log(1 + w / 2)
        elif isinstance(penalty, penalties.LogSquare):
            eta, omega = (w**2 + mpmath.mpf("0.5")) / 2, mpmath.log(1 + 2 * w**2)
        else:
            t = mpmath.asinh(w / 2)
            eta, omega = mpmath.expm1(2 * t), t - mpmath.expm1(-2 * t) / 2
        wanted = float(2 * omega - w**2 / eta)
    found = float(penalty.dual(torch.tensor([float(eta)], dtype=torch.float64)))
    assert found == pytest.approx(wanted, rel=1e-7, abs=1e-23)


@pytest.mark.parametrize(("eps", "w"), [(1e-8, 0.5), (1e-8, 30.0), (1e-6, 5.0), (1e-6, 1e4)])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_the_dual_of_log_square_holds_far_beyond_eps(eps: float, w: float, dtype: torch.dtype, within: float) -> None:
    """Compares f and f' = (w / eta)^2 at eta_hat(w) with 40 digits, where 1 - eps / (2 eta) rounds to 1."""
    with mpmath.workdps(40):
        eta = (mpmath.mpf(w) ** 2 + mpmath.mpf(eps)) / 2
        r = mpmath.mpf(eps) / (2 * eta)
        value, slope = float(2 * (r - 1 - mpmath.log(r))), float((mpmath.mpf(w) / eta) ** 2)
    at = torch.tensor([float(eta)], dtype=dtype)
    assert float(penalties.LogSquare(eps).dual(at)) == pytest.approx(value, rel=within)
    assert float(penalties.LogSquare(eps).dual_slope(at)) == pytest.approx(slope, rel=within)


def test_relations_between_rows() -> None:
    w = torch.logspace(-3, 2, 41, dtype=torch.float64)
    pairs: list[tuple[Penalty, Penalty, float]] = [
        (penalties.Lp(1.0), penalties.L1(), 1.0),
        (penalties.Scaled(penalties.LogSum(2.0), 0.5), penalties.LogSum(1.0), 1.0),
        (penalties.Scaled(penalties.L1(), 0.5), penalties.L1(), 2.0),
        (penalties.Scaled(penalties.LogSquare(1.0), 0.1), penalties.LogSquare(0.01), 1.0),
    ]
    for one, other, factor in pairs:
        torch.testing.assert_close(one.omega(w), factor * other.omega(w))
        torch.testing.assert_close(one.eta_hat(w), other.eta_hat(w) / factor)
        torch.testing.assert_close(one.prox(w, 0.3), other.prox(w, 0.3 * factor))
        torch.testing.assert_close(one.dual(w), factor * other.dual(w * factor))


@pytest.mark.slow
def test_ard_is_the_minimum_and_couples_the_weights() -> None:
    X = torch.tensor([[1.0, 0.9, 0.0], [0.2, 0.1, 1.0], [0.5, 0.7, -0.4], [0.3, -0.2, 0.6]], dtype=torch.float64)
    ard, w = penalties.ARD(X, tau=0.3), torch.tensor([0.7, -0.2, 1.1], dtype=torch.float64)
    grid = torch.logspace(-2, 1, 25, dtype=torch.float64)
    costs = [float((w * w / eta).sum() + ard.dual(eta)) / 2 for eta in torch.cartesian_prod(grid, grid, grid)[::3]]
    assert float(ard.omega(w)) <= min(costs)
    assert float(ard.omega(w)) == pytest.approx(min(costs), rel=3e-2)
    assert float(duality.gap(ard, w, ard.eta_hat(w))) == pytest.approx(0, abs=1e-10)
    covariance = 0.3 * torch.eye(4, dtype=torch.float64) + X @ X.T
    wanted = float(torch.logdet(covariance)) - 4 * math.log(0.3)
    assert float(ard.dual(torch.ones(3, dtype=torch.float64))) == pytest.approx(wanted)
    with pytest.raises(ValueError, match="takes the vector of 3 weights"):
        ard.omega(torch.ones(2))
    with pytest.raises(ValueError, match="no prox"):
        ard.prox(w, 0.1)


def test_hard_threshold_never_pulls() -> None:
    w = torch.tensor([-2.0, 0.0, 0.1])
    assert penalties.HardThreshold(0.5).gradient(w).tolist() == [0, 0, 0]
    assert duality.to_mask_rule(penalties.HardThreshold(0.5), 1.0).keep_probability(w).tolist() == [1, 0, 1]


BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: penalties.Ridge(0.0), ValueError, "c must be a finite number > 0, got 0"),
    (lambda: penalties.Lp(0.0), ValueError, r"p must lie in \(0, 2\), got 0"),
    (lambda: penalties.Lp(2), ValueError, r"p must lie in \(0, 2\), got 2"),
    (lambda: penalties.Lp(math.nan), ValueError, r"p must lie in \(0, 2\), got nan"),
    (lambda: penalties.LogSum(0), ValueError, "eps must be a finite number > 0"),
    (lambda: penalties.LogSum(True), TypeError, "eps must be a number, got True of type bool"),
    (lambda: penalties.LogSquare(-1.0), ValueError, "eps must be a finite number > 0"),
    (lambda: penalties.LogSquare("1"), TypeError, "eps must be a number, got '1' of type str"),  # type: ignore[arg-type]
    (lambda: penalties.MCP(math.inf), ValueError, "c must be a finite number > 0"),
    (lambda: penalties.SCAD(2.0, 1.0), ValueError, r"a must lie in \(2, inf\), got 2"),
    (lambda: penalties.SCAD(3.7, -1.0), ValueError, "k must be a finite number > 0"),
    (lambda: penalties.HardThreshold(0.0), ValueError, "tau must be a finite number > 0"),
    (lambda: penalties.HardConcrete(beta=0.0), ValueError, "beta must be"),
    (lambda: penalties.HardConcrete(gamma=0.1), ValueError, r"gamma must lie in \(-inf, 0\)"),
    (lambda: penalties.HardConcrete(zeta=1.0), ValueError, r"zeta must lie in \(1, inf\)"),
    (lambda: penalties.VariationalDropout("loguniform"), ValueError, "prior must be one of .* closest: 'log_uniform'"),
    (lambda: penalties.Scaled(penalties.L1(), 0.0), ValueError, "t must be a finite number > 0"),
    (lambda: penalties.Scaled("L1", 1.0), TypeError, "p must be a Penalty"),  # type: ignore[arg-type]
    (lambda: penalties.ARD(torch.ones(3), 0.1), ValueError, "X must be a finite floating-point matrix"),
    (lambda: penalties.ARD(torch.ones(3, 2), 0.0), ValueError, "tau must be"),
    (lambda: penalties.ARD([[1.0]], 0.1), TypeError, "X must be a"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("make", "error", "reason"), BAD)
def test_an_invalid_argument_raises_a_clear_error(make: Callable[[], object], error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        make()
