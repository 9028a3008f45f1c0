"""Draws and tables of the hard concrete gate against sampling, finite differences and the penalty."""

from __future__ import annotations

import pytest
import torch

from lightning_sparse import penalties
from lightning_sparse.gates import Gate

PLACES = [-4.0, -1.0, 0.5, 3.0]


def drawn(log_alpha, count, seed=0):
    at = torch.full((count,), log_alpha, dtype=torch.float64)
    return Gate().mask(at, torch.Generator().manual_seed(seed))


def stretched(u, log_alpha, beta=2 / 3, gamma=-0.1, zeta=1.1):
    """Compute s from u as in the paper."""
    inner = torch.sigmoid((torch.log(u) - torch.log1p(-u) + log_alpha) / beta)
    return (inner * (zeta - gamma) + gamma).clamp(0, 1)


@pytest.mark.parametrize("log_alpha", PLACES)
def test_a_mask_has_mean_one_and_the_variance_of_its_keep_probability(log_alpha):
    count = 400_000
    mask, _ = drawn(log_alpha, count)
    alpha = float(Gate().keep_probability(torch.tensor([log_alpha], dtype=torch.float64)))
    spread = float(mask.var())
    assert abs(float(mask.mean()) - 1) < 4 * (spread / count) ** 0.5
    wobble = float(((mask - 1) ** 2).var() / count) ** 0.5  # standard error of the variance
    assert abs(spread - (1 - alpha) / alpha) < 4 * wobble


@pytest.mark.parametrize("log_alpha", PLACES)
def test_it_is_the_gate_of_the_source_over_its_mean(log_alpha):
    mask, _ = drawn(log_alpha, 1000)
    u = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    even = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    torch.testing.assert_close(mask, stretched(u, log_alpha) / stretched(even, log_alpha).mean(), rtol=1e-4, atol=1e-5)
    assert torch.equal(mask == 0, stretched(u, log_alpha) == 0)


@pytest.mark.parametrize("log_alpha", PLACES)
def test_its_slope_is_that_of_the_same_draw(log_alpha):
    step = 1e-4
    (_, slope), (above, _), (below, _) = (drawn(log_alpha + d, 2000) for d in (0.0, step, -step))
    found = (above - below) / (2 * step)
    kinked = ((above == 0) ^ (below == 0)) | ((above == above.max()) ^ (below == below.max()))  # the difference crosses the clip
    assert kinked.float().mean() < 0.01
    torch.testing.assert_close(slope[~kinked], found[~kinked], rtol=2e-3, atol=2e-3 * float(slope.abs().max()))


def test_open_probability_is_the_share_of_draws_above_zero_and_its_slope_autograds():
    log_alpha = torch.tensor(PLACES, dtype=torch.float64, requires_grad=True)
    share = torch.stack([(drawn(at, 100_000)[0] > 0).double().mean() for at in PLACES])
    open_ = Gate().open_probability(log_alpha)
    assert ((share - open_).abs() < 4 * (open_ * (1 - open_) / 100_000).sqrt() + 1e-4).all()
    (slope,) = torch.autograd.grad(open_.sum(), log_alpha)
    torch.testing.assert_close(Gate().open_slope(log_alpha.detach()), slope)


def test_the_gate_is_the_penaltys_dual_below_its_jump():
    """Compares eta = alpha / (1 - alpha) and f = P(s > 0) with the penalty's own table."""
    log_alpha = torch.linspace(-9, 0.5, 200, dtype=torch.float64)
    alpha = Gate().keep_probability(log_alpha)
    eta = alpha / (1 - alpha)
    below = eta < 2.25
    assert 100 < int(below.sum()) < 200
    torch.testing.assert_close(penalties.HardConcrete().dual(eta[below]), Gate().open_probability(log_alpha[below]), rtol=1e-4, atol=1e-8)


def test_single_precision_agrees_with_double():
    log_alpha = torch.linspace(-11.9, 11.9, 4001, dtype=torch.float64)
    for name in ("keep_probability", "open_probability", "open_slope"):
        function = getattr(Gate(), name)
        torch.testing.assert_close(function(log_alpha.float()).double(), function(log_alpha), rtol=2e-4, atol=1e-7)
    assert Gate().mask(log_alpha.float())[0].dtype == torch.float32
    assert float(Gate().keep_probability(torch.tensor(12.0))) <= 1


def test_beyond_its_table_the_gate_stays_at_the_end():
    far, end = Gate().keep_probability(torch.tensor([-40.0, 40.0])), Gate().keep_probability(torch.tensor([-12.0, 12.0]))
    assert torch.equal(far, end)
    mask, slope = Gate().mask(torch.tensor([-1e4, 1e4]))
    assert torch.isfinite(mask).all()
    assert torch.isfinite(slope).all()
