"""PenaltyLoss against the same term in the loss."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from toys import Spy, Toy, data, trainer, weights

from lightning_sparse import numeric, penalties
from lightning_sparse.callbacks import PenaltyLoss, ReweightedPenalty

LAM = 1e-2


@dataclass(frozen=True)
class Disagreeing(penalties.LogSum):
    """A penalty with LogSum's eta_hat and gradient and another omega."""

    def omega(self, w):
        return w.abs() + 0.5 * torch.log1p(w * w)


class InLoss(Toy):
    """A toy with lam * Omega as a term of the loss."""

    penalty: penalties.LogSum

    def training_step(self, batch, index):
        term = sum(self.penalty.omega(p).sum() for p in self.network.parameters() if p.dim() == 2)
        return super().training_step(batch, index) + LAM * term


def after_steps(module, callback, accumulate):
    """Return the live weights after each optimiser step."""
    seen = []
    look = lambda moment, module: seen.append(weights(module)) if moment == "batch end" else None  # noqa: E731
    trainer(*callback, Spy(look), accumulate_grad_batches=accumulate).fit(module, data())
    return seen[accumulate - 1 :: accumulate]


def difference(penalty, form, accumulate=1):
    reference = InLoss()
    reference.penalty = penalty
    pairs = zip(after_steps(Toy(), [form(penalty, LAM)], accumulate), after_steps(reference, [], accumulate), strict=True)
    return max(float((own[name] - wanted[name]).abs().max()) for own, wanted in pairs for name in own)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("penalty", [penalties.LogSum(2.0), Disagreeing(2.0)], ids=["LogSum", "disagreeing"])
def test_adam_takes_the_steps_that_a_term_in_the_loss_gives(penalty, accumulate):
    assert difference(penalty, PenaltyLoss, accumulate) < 1e-6


def test_the_slope_is_autograds_of_omega_and_not_the_formula():
    """Uses a penalty whose omega and gradient disagree."""
    assert difference(Disagreeing(2.0), ReweightedPenalty) > 1e-3
    w = torch.tensor([-1.5, -0.2, 0.4, 2.0])
    leaf = w.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(Disagreeing(2.0).omega(leaf).sum(), leaf)
    torch.testing.assert_close(PenaltyLoss(Disagreeing(2.0), LAM).method.gradient(w), wanted)
    torch.testing.assert_close(numeric.slope(Disagreeing(2.0).omega, w), wanted)
