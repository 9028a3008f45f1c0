"""Moments of the mask noise."""

from __future__ import annotations

import pytest
import torch

from lightning_sparse import noise


@pytest.mark.parametrize("kind", [noise.ScaledBernoulli(), noise.Gaussian()])
def test_noise_has_mean_one_and_the_promised_variance(kind):
    generator = torch.Generator().manual_seed(0)
    for alpha in (0.1, 0.5, 0.9):
        drawn = kind.sample(torch.full((200_000,), alpha, dtype=torch.float64), generator)
        assert drawn.mean().item() == pytest.approx(1, abs=0.03)
        assert drawn.var().item() == pytest.approx((1 - alpha) / alpha, rel=0.03)
    assert (kind.sample(torch.zeros(9), generator) == 0).all()
    assert (kind.sample(torch.ones(9), generator) == 1).all()
    again = torch.Generator().manual_seed(0)
    assert torch.equal(kind.sample(torch.full((9,), 0.5), again), kind.sample(torch.full((9,), 0.5), again.manual_seed(0)))


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 0.123456, 0.5, 0.99999, 1.0])
def test_over_all_draws_a_bernoulli_mask_has_mean_one_exactly(alpha, monkeypatch):
    monkeypatch.setattr(noise, "random_words", lambda count, *_: torch.arange(65536, dtype=torch.int32).to(torch.uint16))
    mask = noise.ScaledBernoulli().sample(torch.full((65536,), alpha, dtype=torch.float64))
    assert mask.mean() == pytest.approx(1, abs=1e-12)
    assert mask.count_nonzero() / 65536 == pytest.approx(alpha, abs=1 / 65536)
