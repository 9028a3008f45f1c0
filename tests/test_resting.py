"""Which weights rest at zero: the same alone as among others, and for each penalty its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sparse import penalties, proximal
from lightning_sparse.duality import Penalty


@pytest.mark.parametrize("penalty", [penalties.L1(), penalties.LogSum(2.0), penalties.MCP(1.0)], ids=repr)
def test_a_weight_rests_alone_as_it_does_among_others(penalty: penalties.L1) -> None:
    """Whatever other weights and steps a tensor holds; also where they lie in memory in another order, or alone."""
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
    """LogSum with its eps in whatever the caller likes."""

    eps: Any

    def omega(self, w: Tensor) -> Tensor:
        return penalties.LogSum(float(self.eps[0])).omega(w)

    def eta_hat(self, w: Tensor) -> Tensor:
        return penalties.LogSum(float(self.eps[0])).eta_hat(w)


class Louder(penalties.LogSum):
    """Not a dataclass of its own: equal to each LogSum of its eps, whatever its factor."""

    factor = 1.0

    def omega(self, w: Tensor) -> Tensor:
        return self.factor * super().omega(w)


def test_penalties_that_differ_or_change_rest_apart() -> None:
    """Against the exact prox of each; what is remembered of one penalty is not another's, nor that of its former self."""
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


def test_a_step_that_is_no_number_holds_nothing() -> None:
    steps = torch.tensor([torch.nan, -1.0, 0.0, 1.0])
    assert proximal.in_zero_region(penalties.L1(), torch.full((4,), 1e-3), steps, 1.0, 1.0).tolist() == [False, False, False, True]
