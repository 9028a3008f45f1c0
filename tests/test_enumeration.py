"""The duality without sampling: exact expected loss over all Bernoulli masks of a small least-squares problem."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lightning_sparse import duality, mask_rules, numeric, penalties
from lightning_sparse.duality import MaskRule, Penalty

ROWS = [getattr(penalties, name)(**kwargs) for name in penalties.__all__ for kwargs in getattr(penalties, name).examples]
ROWS += [getattr(mask_rules, name)(**kwargs) for name in mask_rules.__all__ for kwargs in getattr(mask_rules, name).examples]
SEPARABLE = [row for row in ROWS if row.separable]


def problem(standardised: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    X = torch.randn(12, 6, dtype=torch.float64, generator=generator)
    X = X / X.square().mean(0).sqrt()
    if not standardised:
        X = X * torch.tensor([0.4, 0.7, 1.5, 2.0, 0.9, 1.2], dtype=torch.float64)
    return (
        X,
        torch.randn(12, dtype=torch.float64, generator=generator),
        torch.tensor([0.8, -0.1, 0.3, 0.0, -1.7, 0.03], dtype=torch.float64),
    )


def loss(design: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return (y - design @ w).square().sum() / (2 * len(y))


def masked_loss(design: Tensor, y: Tensor, w: Tensor, alpha: Tensor) -> Tensor:
    """Compute E_s L(s * w) over all 2^d masks, with s_j = 1/alpha_j at probability alpha_j, else 0."""
    total = torch.zeros((), dtype=torch.float64)
    for kept in itertools.product([0.0, 1.0], repeat=len(w)):
        mask = torch.tensor(kept, dtype=torch.float64)
        chance = torch.where(mask > 0, alpha, 1 - alpha).prod()
        if chance > 0:
            total = total + chance * loss(design, y, numeric.quotient(mask * w, alpha))
    return total


def rule_and_eta(row: Penalty | MaskRule, w: Tensor) -> tuple[MaskRule, Tensor]:
    """Return a row's mask rule, and eta_hat from its penalty."""
    rule = row if isinstance(row, MaskRule) else duality.to_mask_rule(row, 0.2)
    return rule, duality.to_penalty(row).eta_hat(w)


@pytest.mark.parametrize("row", SEPARABLE, ids=repr)
def test_all_masks_equal_the_reweighted_penalty(row: Penalty | MaskRule) -> None:
    X, y, w = problem(standardised=True)
    rule, eta = rule_and_eta(row, w)
    penalised = loss(X, y, w) + rule.lam / 2 * numeric.quotient(w * w, eta).sum()
    torch.testing.assert_close(masked_loss(X, y, w, rule.keep_probability(w)), penalised, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("row", SEPARABLE, ids=repr)
def test_with_other_columns_the_calibrated_mask_equals_it(row: Penalty | MaskRule) -> None:
    X, y, w = problem(standardised=False)
    rule, eta = rule_and_eta(row, w)
    calibrated = duality.keep_probability(X.square().mean(0) * eta, rule.lam)
    penalised = loss(X, y, w) + rule.lam / 2 * numeric.quotient(w * w, eta).sum()
    torch.testing.assert_close(masked_loss(X, y, w, calibrated), penalised, rtol=1e-12, atol=1e-12)


def test_with_other_columns_the_plain_mask_does_not() -> None:
    X, y, w = problem(standardised=False)
    rule, eta = rule_and_eta(penalties.LogSum(2.0), w)
    penalised = loss(X, y, w) + rule.lam / 2 * numeric.quotient(w * w, eta).sum()
    assert abs(masked_loss(X, y, w, rule.keep_probability(w)) - penalised) > 1e-2


def test_the_rows_are_all_there() -> None:
    assert {type(row).__name__ for row in ROWS} == {*penalties.__all__, *mask_rules.__all__}
    assert {type(row).__name__ for row in ROWS if not row.separable} == {"ARD", "TopK", "TargetedDropout"}
