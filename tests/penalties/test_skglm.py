"""Agreement with skglm's values and proxes, at the strength alpha in its penalties."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_sparse import penalties
from lightning_sparse.duality import Penalty

W = np.array([0.003, 0.2, 0.41, 0.77, 1.3, 2.2, 5.0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_values_and_proxes_are_those_of_skglm() -> None:
    from skglm.penalties import L0_5, L1, SCAD, LogSumPenalty, MCPenalty

    pairs: list[tuple[object, Penalty, float]] = [  # skglm's penalty, ours, and the factor between them
        (L1(0.7), penalties.L1(), 0.7),
        (MCPenalty(0.5, 3.0), penalties.MCP(1.5), 0.5),
        (SCAD(0.4, 3.7), penalties.SCAD(3.7, 0.4), 0.4),
        (LogSumPenalty(0.6, 0.3), penalties.LogSum(0.3), 0.6),
        (L0_5(0.9), penalties.Lp(0.5), 0.45),
    ]
    for theirs, ours, factor in pairs:
        for w in W:
            value = factor * float(ours.omega(torch.tensor(w)))
            assert value == pytest.approx(theirs.value(np.array([w])), rel=1e-9), ours  # type: ignore[attr-defined]
            prox = float(ours.prox(torch.tensor(w), 0.6 * factor))
            assert prox == pytest.approx(theirs.prox_1d(w, 0.6, 0), rel=1e-7, abs=1e-9), (ours, w)  # type: ignore[attr-defined]
