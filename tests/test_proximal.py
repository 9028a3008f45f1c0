"""The zero region of the prox: independent of other weights, and specific to each penalty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sparse import penalties, proximal
from lightning_sparse.duality import Penalty


@pytest.mark.parametrize("penalty", [penalties.L1(), penalties.LogSum(2.0), penalties.MCP(1.0)], ids=repr)
def test_the_zero_region_does_not_depend_on_other_weights(penalty: penalties.L1) -> None:
    """For any other weights and step sizes in the tensor, in any memory order."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(40, 30, generator=generator) * torch.logspace(-4, 1, 30)
    rate = torch.rand(40, 30, generator=generator) * torch.logspace(-3, 2, 40)[:, None]
    whole = proximal.in_zero_region(penalty, w, rate, 0.1, 10.0)
    assert 0.1 < whole.double().mean() < 0.9
    assert torch.equal(proximal.in_zero_region(penalty, w.T, rate.T, 0.1, 10.0), whole.T)
    alone = [proximal.in_zero_region(penalty, one, step, 0.1, 10.0) for one, step in zip(w.view(-1, 1), rate.view(-1, 1), strict=True)]
    assert torch.equal(torch.cat(alone), whole.view(-1))


@dataclass(frozen=True)
class Knots(Penalty):
    """LogSum with an eps of any type."""

    eps: Any

    def omega(self, w: Tensor) -> Tensor:
        return penalties.LogSum(float(self.eps[0])).omega(w)

    def eta_hat(self, w: Tensor) -> Tensor:
        return penalties.LogSum(float(self.eps[0])).eta_hat(w)


class Louder(penalties.LogSum):
    """A subclass that is not a dataclass: equal to a LogSum of the same eps, for any factor."""

    factor = 1.0

    def omega(self, w: Tensor) -> Tensor:
        return self.factor * super().omega(w)


def test_different_or_changed_penalties_have_their_own_zero_regions() -> None:
    """Against the exact prox of each; cached values are not shared between penalties or kept after a change."""
    w, rate = torch.linspace(0, 1, 400), torch.full((400,), 0.01)
    held = lambda penalty: int(proximal.in_zero_region(penalty, w, rate, 1.0, 10.0).sum())  # noqa: E731
    wanted = {eps: int((penalties.LogSum(eps).prox(w, 0.1) == 0).sum()) for eps in (2.0, 0.5, 0.1)}
    assert len(set(wanted.values())) == 3
    for eps, count in wanted.items():
        assert held(penalties.LogSum(eps)) == pytest.approx(count, abs=2)
        assert held(Knots([eps])) == pytest.approx(count, abs=2)
    changing = torch.tensor([2.0])
    before = held(Knots(changing))
    changing.fill_(0.1)
    assert (before, held(Knots(changing))) == pytest.approx((wanted[2.0], wanted[0.1]), abs=2)
    loud = Louder(2.0)
    before = held(loud)
    object.__setattr__(loud, "factor", 4.0)
    assert held(loud) > before + 50


def test_a_nan_step_size_gives_an_empty_zero_region() -> None:
    steps = torch.tensor([torch.nan, -1.0, 0.0, 1.0])
    assert proximal.in_zero_region(penalties.L1(), torch.full((4,), 1e-3), steps, 1.0, 1.0).tolist() == [False, False, False, True]
