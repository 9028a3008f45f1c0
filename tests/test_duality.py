"""Both directions of the duality, refusals, numeric fall-backs and fine_print."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lightning_sparse import duality, mask_rules, numeric, penalties
from lightning_sparse.duality import MaskRule, Penalty

W = torch.logspace(-4, 2, 61, dtype=torch.float64)


@dataclass(frozen=True)
class Plain(Penalty):
    """Only the two primitives of another penalty; the base class derives the rest."""

    of: Penalty

    def omega(self, w: Tensor) -> Tensor:
        return self.of.omega(w)

    def eta_hat(self, w: Tensor) -> Tensor:
        return self.of.eta_hat(w)


CLOSED = [penalties.LogSum(2.0), penalties.LogSquare(0.5), penalties.MCP(1.5), penalties.SCAD(3.7, 0.6), penalties.Lp(0.5), penalties.L1()]
CLOSED += [mask_rules.Standout(2.0, -0.5).to_penalty(), penalties.HardThreshold(0.7), penalties.Ridge(0.4)]


def test_keep_probability_and_eta_are_inverse_and_know_the_ends() -> None:
    eta = torch.tensor([0.0, 1e-300, 0.25, 1.0, 1e12, torch.inf], dtype=torch.float64)
    alpha = duality.keep_probability(eta, 0.5)
    assert alpha[0] == 0
    assert alpha[-1] == 1
    assert alpha[2] == pytest.approx(1 / 3)
    torch.testing.assert_close(duality.eta(alpha, 0.5)[:4], eta[:4])


@pytest.mark.parametrize("lam", [0, -1.0, math.nan, math.inf, True, "1"])
def test_an_invalid_lam_is_refused(lam: object) -> None:
    with pytest.raises((ValueError, TypeError), match="lam must be a"):
        duality.keep_probability(torch.ones(1), lam)  # type: ignore[arg-type]
    with pytest.raises((ValueError, TypeError), match="lam must be a"):
        duality.to_mask_rule(penalties.L1(), lam)  # type: ignore[arg-type]


def test_there_and_back_is_the_penalty_itself() -> None:
    penalty = penalties.MCP(2.0)
    rule = duality.to_mask_rule(penalty, 3e-3)
    assert rule.lam == 3e-3
    assert duality.to_penalty(rule) is penalty
    assert duality.to_penalty(penalty) is penalty


def test_a_rule_at_another_lambda_keeps_its_penalty() -> None:
    rule = duality.to_mask_rule(mask_rules.Standout(), 0.1)
    w = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(rule.keep_probability(w), 1 / (1 + 0.1 / w.exp()))


@pytest.mark.parametrize("penalty", CLOSED[:7], ids=repr)
def test_the_integral_of_a_plain_function_is_the_penalty(penalty: Penalty) -> None:
    found = duality.to_penalty(lambda w: duality.keep_probability(penalty.eta_hat(w), 1.0))
    torch.testing.assert_close(found.omega(W), penalty.omega(W), rtol=2e-6, atol=1e-12)
    far = torch.tensor([1e-12, 1e-9, 1e6, 1e9], dtype=torch.float64)
    torch.testing.assert_close(found.omega(far), penalty.omega(far), rtol=1e-3, atol=1e-24)


def test_a_numeric_penalty_can_stand_in_a_loss() -> None:
    found = duality.to_penalty(lambda w: w / (1 + w))  # L1
    w = torch.tensor([-2.0, 0.0, 0.3], requires_grad=True)
    found.omega(w).sum().backward()
    torch.testing.assert_close(w.grad, torch.tensor([-1.0, 0.0, 1.0]))


@pytest.mark.parametrize("penalty", CLOSED, ids=repr)
def test_the_numeric_dual_and_prox_agree_with_the_closed_forms(penalty: Penalty) -> None:
    eta = torch.cat([torch.zeros(1), torch.logspace(-4, 4, 33)]).double()
    numerical = Plain(penalty)
    torch.testing.assert_close(numerical.dual(eta), penalty.dual(eta), rtol=1e-9, atol=1e-12)
    for step in (0.05, 0.9, 4.0):
        torch.testing.assert_close(numerical.prox(W, step), penalty.prox(W, step), rtol=1e-6, atol=1e-7)


def test_the_gap_is_that_of_the_definition() -> None:
    penalty, w = penalties.LogSum(2.0), torch.tensor([0.5], dtype=torch.float64)
    assert float(duality.gap(penalty, w, penalty.eta_hat(w))) == pytest.approx(0, abs=1e-15)
    assert float(duality.gap(penalty, w, 1.5 * penalty.eta_hat(w))) > 1e-3


@pytest.mark.parametrize(
    ("alpha", "reason"),
    [
        (lambda w: 1 / (1 + w), r"decreases at w = 0: from 1 to 0\.99999999 at w = 1e-08"),
        (lambda w: torch.where(w > 3, 0.4, 0.6).to(w), r"decreases at w = 2\.9"),
        (lambda w: (w * w).clamp(max=1), r"diverges at 0: near w = 1e-08 it grows like w\^-1"),
        (lambda w: (w - 1).clamp(0, 1), "alpha is 0 at w = 1e-08"),
        (lambda w: w, r"must lie in \[0, 1\]: it is 1.0\d+ at w = 1.0"),
        (lambda w: w / w, "must lie in .* it is nan at w = 0"),
        (lambda w: w.mean(), "must keep the shape"),
    ],
)
def test_a_rule_without_a_penalty_is_refused_naming_the_weight(alpha: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        duality.to_penalty(alpha)  # type: ignore[arg-type]


def test_other_objects_than_rules_are_refused() -> None:
    for given in (3, "LogSum", mask_rules.Standout):
        with pytest.raises(TypeError, match="did you forget to call it"):
            duality.to_penalty(given)  # type: ignore[arg-type]


class Coupled(MaskRule):
    separable = False

    def keep_probability(self, w: Tensor) -> Tensor:
        return w.abs() / (w.abs() + w.abs().flip(0))


def test_a_coupled_rule_without_a_penalty_says_so() -> None:
    with pytest.raises(ValueError, match="has no penalty: it is not separable"):
        duality.to_penalty(Coupled())


FINE_PRINT = {
    penalties.Ridge(2.0): ("zero", 0.0, False),
    penalties.Lp(0.5): ("infinite", math.inf, True),
    penalties.Lp(1.0): ("finite", 1.0, False),
    penalties.Lp(1.5): ("zero", 0.0, False),
    penalties.L1(): ("finite", 1.0, False),
    penalties.LogSum(0.1): ("finite", 10.0, True),
    penalties.LogSquare(0.1): ("zero", 0.0, True),
    penalties.MCP(2.0): ("finite", 1.0, True),
    penalties.SCAD(3.7, 0.5): ("finite", 1.0, True),
    penalties.VariationalDropout("log_uniform"): ("finite", 1.0, True),
    penalties.VariationalDropout("empirical_bayes"): ("finite", 1.0, True),
    penalties.VariationalDropout("molchanov"): ("finite", 1.0, True),
    penalties.HardConcrete(): ("finite", 1.475, True),
    penalties.HardThreshold(0.3): ("infinite", math.inf, True),
    penalties.Scaled(penalties.MCP(1.0), 0.5): ("finite", 2.0, True),
    mask_rules.Standout().to_penalty(): ("zero", 0.0, True),
    mask_rules.LinearRamp(0.2).to_penalty(): ("finite", 0.2, True),
    duality.RulePenalty(duality.CallableRule(torch.sigmoid)): ("zero", 0.0, True),
    duality.RulePenalty(duality.CallableRule(lambda w: w / (1 + w))): ("finite", 1.0, False),
}


@pytest.mark.parametrize("penalty", FINE_PRINT, ids=lambda penalty: repr(penalty).partition(" at 0x")[0])
def test_the_fine_print_of_every_row(penalty: Penalty) -> None:
    kind, slope, unbiased = FINE_PRINT[penalty]
    found = duality.fine_print(penalty)
    assert (found.kind, found.unbiased) == (kind, unbiased)
    assert found.slope_at_zero == pytest.approx(slope, abs=1e-3)


def test_the_fine_print_covers_every_separable_class() -> None:
    covered = {type(penalty).__name__ for penalty in FINE_PRINT}
    assert {name for name in penalties.__all__ if getattr(penalties, name).separable} <= covered | {"Scaled"}


def test_the_fine_print_refuses_what_couples_its_weights() -> None:
    with pytest.raises(ValueError, match="not separable"):
        duality.fine_print(mask_rules.TopK(0.1).to_penalty())


def test_an_inadmissible_penalty_is_refused_naming_the_weight() -> None:
    @dataclass(frozen=True)
    class Quartic(Penalty):
        def omega(self, w: Tensor) -> Tensor:
            return w**4 / 4

        def eta_hat(self, w: Tensor) -> Tensor:
            return 1 / (w * w)

    with pytest.raises(ValueError, match="not subquadratic: eta_hat decreases at w = 1e-08"):
        duality.check_admissible(Quartic())
    assert duality.check_admissible(penalties.SCAD(3.7, 1.0)) is None


def test_a_quotient_has_no_nan() -> None:
    top, bottom = torch.tensor([0.0, 0.0, 1.0, torch.inf, 2.0]), torch.tensor([0.0, torch.inf, torch.inf, torch.inf, 4.0])
    assert numeric.quotient(top, bottom).tolist() == [0, 0, 0, 0, 0.5]


def test_the_keep_probability_has_a_gradient() -> None:
    eta = torch.linspace(0.1, 3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda eta: duality.keep_probability(eta, 0.3), eta)
