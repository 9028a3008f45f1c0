"""A custom penalty, defined in this file without changes to the package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from toys import Toy, data, trainer, weights

from lightning_sparse import duality, testing
from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, ReweightedPenalty, Sparsifier
from lightning_sparse.duality import Examples, Penalty


@dataclass(frozen=True)
class Exponential(Penalty):
    """omega(w) = 1 - exp(-|w| / c), eta_hat(w) = c |w| exp(|w| / c); the rest is derived numerically."""

    c: float
    examples: ClassVar[Examples] = ({"c": 0.3}, {"c": 2.0})

    def omega(self, w: Tensor) -> Tensor:
        return -torch.expm1(-w.abs() / self.c)

    def eta_hat(self, w: Tensor) -> Tensor:
        return self.c * w.abs() * torch.exp(w.abs() / self.c)


@pytest.mark.parametrize("given", Exponential.examples, ids=str)
def test_a_custom_penalty_passes_the_contract_and_has_a_mask_rule(given: dict[str, float]) -> None:
    penalty = Exponential(**given)
    testing.check_penalty(penalty)
    w = torch.linspace(-2, 2, 9, dtype=torch.float64)
    rule = duality.to_mask_rule(penalty, lam=0.1)
    torch.testing.assert_close(rule.keep_probability(w), 1 / (1 + 0.1 / penalty.eta_hat(w)))
    assert duality.to_penalty(rule) == penalty


@pytest.mark.parametrize("form", [ReweightedPenalty, AdaptiveProx, AdaptiveMask])
def test_a_custom_penalty_gives_zeros_and_safe_files(form: type[Sparsifier], tmp_path: Path) -> None:
    module, run = Toy(decay=True), trainer(form(Exponential(0.3), 0.1), epochs=8)
    run.fit(module, data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    zeros = sum(int((w == 0).sum()) for name, w in weights(module).items() if w.dim() > 1)
    assert 0 < zeros < 176
    (state,) = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"].values()
    assert state["recipe"]["init_args"]["penalty"] == {"class_path": "Exponential", "init_args": {"c": 0.3}}
