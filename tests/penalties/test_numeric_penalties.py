"""Tabulated penalties against independent computations, to 1e-6 relative in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.special import dawsn, expit

from lightning_sparse.penalties import MCP, HardConcrete, LogSum, VariationalDropout

W = np.geomspace(1e-4, 1e2, 19) * 1.0371  # between the nodes of the tables
CHECK = torch.tensor([0.01, 0.1, 0.5, 1, 2, 5, 10], dtype=torch.float64)  # four to five digits in the source


def log_uniform(w: float) -> tuple[float, float, float]:
    """Compute eta, f and omega at w from the root of w^2 = eta^2 f'(eta) and adaptive quadrature of f'."""

    def rate(eta: float) -> float:
        return float(dawsn(math.sqrt(eta / 2)) / math.sqrt(eta / 2))

    eta = brentq(lambda eta: eta * math.sqrt(rate(eta)) - w, w / 2, 4 * w + 4 * w * w, xtol=1e-300, rtol=1e-14)
    f = quad(lambda x: math.exp(x) * rate(math.exp(x)), -60, math.log(eta), epsabs=0, epsrel=1e-12, limit=400)[0]
    return eta, f, (w * w / eta + f) / 2


def molchanov(w: float) -> tuple[float, float, float]:
    def f(eta: float) -> float:
        return float(2 * (0.63576 * expit(1.48695 * math.log(eta) - 1.8732) + math.log1p(eta) / 2))

    def rate(eta: float) -> float:
        gate = float(expit(1.48695 * math.log(eta) - 1.8732))
        return 2 * 0.63576 * 1.48695 * gate * (1 - gate) / eta + 1 / (1 + eta)

    eta = brentq(lambda eta: eta * math.sqrt(rate(eta)) - w, w / 4, 4 * w + 4 * w * w, xtol=1e-300, rtol=1e-14)
    return eta, f(eta), (w * w / eta + f(eta)) / 2


def moments(log_alpha: float) -> tuple[float, float]:
    """Compute 1/eta = Var s / (E s)^2 and P(s > 0) by quadrature over the gate's uniform variable."""
    beta, gamma, zeta = 2 / 3, -0.1, 1.1

    def uniform(value: float) -> float:
        share = (value - gamma) / (zeta - gamma)
        return float(expit(beta * math.log(share / (1 - share)) - log_alpha))

    def gate(u: float) -> float:
        return float(expit((math.log(u / (1 - u)) + log_alpha) / beta)) * (zeta - gamma) + gamma

    low, high = uniform(0), uniform(1)
    first, second = (quad(lambda u, k=k: gate(u) ** k, low, high, epsabs=1e-14, epsrel=1e-13)[0] + 1 - high for k in (1, 2))
    return second / first**2 - 1, 1 - low


def hard_concrete(w: float) -> tuple[float, float, float]:
    def pull(log_alpha: float, h: float = 1e-3) -> float:
        """Differentiate w^2 / eta + f by five-point differences."""
        values = [w * w * moments(log_alpha + k * h)[0] + moments(log_alpha + k * h)[1] for k in (-2, -1, 1, 2)]
        return (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * h)

    start = math.log(w)  # eta ~ e^(log alpha) near 0
    log_alpha = brentq(pull, start - 3, min(start + 3, 1.5), xtol=1e-12)
    v, f = moments(log_alpha)
    return 1 / v, f, (w * w * v + f) / 2


def compare(
    penalty: VariationalDropout | HardConcrete, reference: list[tuple[float, float, float]], w: np.ndarray, rel: float = 1e-6
) -> None:
    eta, f, omega = (torch.tensor(column, dtype=torch.float64) for column in zip(*reference, strict=True))
    at = torch.from_numpy(w)
    for value, wanted in ((penalty.eta_hat(at), eta), (penalty.omega(at), omega), (penalty.gradient(at), at / eta), (penalty.dual(eta), f)):
        torch.testing.assert_close(value, wanted, rtol=rel, atol=0)


def test_the_log_uniform_prior() -> None:
    compare(VariationalDropout("log_uniform"), [log_uniform(w) for w in W], W)
    assert VariationalDropout().prior == "log_uniform"


def test_molchanovs_fit() -> None:
    compare(VariationalDropout("molchanov"), [molchanov(w) for w in W], W)


def test_the_hard_concrete_gate_below_its_jump() -> None:
    w = np.array([1e-3, 0.02, 0.1, 0.3, 0.5])
    compare(HardConcrete(), [hard_concrete(at) for at in w], w)


def test_the_hard_concrete_gate_jumps_where_both_branches_cost_the_same() -> None:
    below, above = 0.5349, 0.5351
    penalty, w = HardConcrete(), torch.tensor([below, above, 3.0], dtype=torch.float64)
    assert hard_concrete(below)[2] < 0.5 < hard_concrete(above)[2]  # omega is 1/2 at eta = inf
    assert penalty.eta_hat(w).isinf().tolist() == [False, True, True]
    torch.testing.assert_close(penalty.omega(w)[1:], torch.full((2,), 0.5, dtype=torch.float64), rtol=1e-6, atol=0)
    assert float(penalty.gradient(torch.tensor([1e-8]))) == pytest.approx(1.475, abs=1e-3)
    mcp = math.sqrt(2) * MCP(math.sqrt(0.5)).omega(CHECK)
    assert float((penalty.omega(CHECK) / mcp - 1).abs().max()) < 0.07


def test_the_check_values_of_the_notes() -> None:
    wanted = torch.tensor([0.00999, 0.09916, 0.4788, 0.9136, 1.6394, 2.7227, 3.4327], dtype=torch.float64)
    torch.testing.assert_close(VariationalDropout("log_uniform").omega(CHECK), wanted, rtol=1e-3, atol=0)
    wanted = torch.tensor([0.0100, 0.1017, 0.5468, 1.2139, 3.2105, 23.834, 98.97], dtype=torch.float64)
    torch.testing.assert_close(VariationalDropout("log_uniform").eta_hat(CHECK), wanted, rtol=2e-3, atol=0)
    wanted = torch.tensor([0.00998, 0.09754, 0.44266, 0.79023, 1.29559, 2.12869, 2.80754], dtype=torch.float64)
    torch.testing.assert_close(VariationalDropout("empirical_bayes").omega(CHECK), wanted, rtol=1e-3, atol=0)
    wanted = torch.tensor([0.00998, 0.09758, 0.4463, 0.8109, 1.3863, 2.5055, 3.5835], dtype=torch.float64)
    torch.testing.assert_close(2 * LogSum(2.0).omega(CHECK), wanted, rtol=1e-3, atol=0)
    exact, fit = VariationalDropout("log_uniform").omega(CHECK), VariationalDropout("molchanov").omega(CHECK)
    assert float((fit / exact - 1).abs().max()) < 0.02


@pytest.mark.parametrize("penalty", [VariationalDropout("log_uniform"), VariationalDropout("molchanov"), HardConcrete()], ids=repr)
def test_float32_takes_another_path_to_the_same_gradient(penalty: VariationalDropout | HardConcrete) -> None:
    w = torch.cat([torch.linspace(-3, 3, 4001), torch.logspace(-9, 17, 400), torch.tensor([0.0, -0.0, torch.inf, -torch.inf])])
    w = w[(w.abs() - 0.534989).abs() > 1e-6]
    torch.testing.assert_close(penalty.gradient(w).double(), penalty.gradient(w.double()), rtol=2e-6, atol=1e-30)
    assert penalty.gradient(torch.tensor([float("nan")])).isnan().all()


def test_a_gate_without_a_branch_is_refused() -> None:
    with pytest.raises(ValueError, match="no single branch"):
        HardConcrete(beta=50.0).omega(torch.ones(1))


def test_the_slope_of_the_dual_in_float32_follows_dawson_from_zero_to_the_largest_float() -> None:
    penalty = VariationalDropout("log_uniform")
    eta = torch.tensor(np.concatenate([np.geomspace(1e-30, 1e38, 1399), [1.17e-38, 5e-45]]), dtype=torch.float32)
    x = np.sqrt(eta.double().numpy() / 2)
    np.testing.assert_allclose(penalty.dual_slope(eta).double().numpy(), dawsn(x) / x, rtol=2e-6)
    assert penalty.dual_slope(torch.zeros(1)).tolist() == [1.0]
    ends = penalty.dual_slope(torch.tensor([math.inf, math.nan, -math.nan, 1.0]))
    assert ends[1:3].isnan().all()
    assert ends[0] == 0
    assert ends[3] == pytest.approx(float(dawsn(math.sqrt(0.5)) / math.sqrt(0.5)), rel=1e-6)
