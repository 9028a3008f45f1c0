"""LinearRamp: keep probability proportional to |w|."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_sparse import _checks
from lightning_sparse.duality import Examples, MaskRule, Penalty
from lightning_sparse.penalties.concave import MCP
from lightning_sparse.penalties.scaled import Scaled


@dataclass(frozen=True)
class LinearRamp(MaskRule):
    """alpha(w) = min(1, |w| / tau). The equivalent penalty is tau * MCP(tau), written Scaled(MCP(tau^2), 1 / tau).

    Raises ValueError unless tau > 0.

    Args:
        tau: weights with |w| >= tau are always kept.
    """

    tau: float
    examples: ClassVar[Examples] = ({"tau": 1.0}, {"tau": 0.2})

    def __post_init__(self) -> None:
        _checks.positive("tau", self.tau)

    def keep_probability(self, w: Tensor) -> Tensor:
        return (w.abs() / self.tau).clamp(max=1)

    def to_penalty(self) -> Penalty:
        return Scaled(MCP(self.tau**2), 1 / self.tau)
