"""Gaussian draws for tensors of any memory order."""

from __future__ import annotations

import pytest
import torch

from lightning_sparse import noise


def test_draws_follow_the_order_in_memory_and_leave_gaps_alone() -> None:
    seeded = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    images = torch.empty(4, 3, 5, 6)
    plain, last = (noise.normal_like(t, seeded()) for t in (images, images.to(memory_format=torch.channels_last)))
    assert (last.shape, last.stride()) == (plain.shape, images.to(memory_format=torch.channels_last).stride())
    assert torch.equal(last.permute(0, 2, 3, 1).reshape(-1), plain.reshape(-1))
    gaps = torch.zeros(6, 8, dtype=torch.float64)[:, ::2]
    assert torch.equal(noise.normal_like(gaps, seeded()), torch.empty(6, 4, dtype=torch.float64).normal_(generator=seeded()))
    alpha = torch.full((64, 8, 9, 9), 0.5).to(memory_format=torch.channels_last)
    mask = noise.Gaussian().sample(alpha, seeded())
    assert mask.stride() == alpha.stride()
    assert mask.mean() == pytest.approx(1.0, abs=0.02)
    assert mask.var() == pytest.approx(1.0, abs=0.03)
