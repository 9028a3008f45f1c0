"""Closed forms compile with torch.compile without graph breaks."""

from __future__ import annotations

import pytest
import torch

from lightning_sparse import mask_rules, penalties
from lightning_sparse.duality import Penalty

CLOSED = [
    penalties.LogSum(2.0),
    penalties.MCP(1.0),
    penalties.SCAD(3.7, 1.0),
    penalties.Lp(0.5),
    penalties.LogSquare(1.0),
    penalties.Ridge(1.0),
]
CLOSED += [penalties.L1(), penalties.HardThreshold(0.1), penalties.Scaled(penalties.LogSum(2.0), 0.5), mask_rules.Standout().to_penalty()]
CLOSED += [penalties.VariationalDropout("empirical_bayes"), mask_rules.LinearRamp(1.0).to_penalty()]


@pytest.mark.slow
@pytest.mark.parametrize("penalty", CLOSED, ids=repr)
def test_eta_hat_and_gradient_compile(penalty: Penalty) -> None:
    torch._dynamo.reset()
    w = torch.linspace(-2, 2, 9)
    compiled = torch.compile(lambda w: (penalty.eta_hat(w), penalty.gradient(w)), backend="eager", fullgraph=True)
    for found, wanted in zip(compiled(w), (penalty.eta_hat(w), penalty.gradient(w)), strict=True):
        torch.testing.assert_close(found, wanted)
