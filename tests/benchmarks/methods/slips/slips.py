"""Two slips of the paper's published runs, switched on: for `lightning-sparse reproduce --rows`, not for use.

The published eta-Trick minimised a dual of LogSum whose second term was doubled by a parenthesis, plus 1e-3 times the sum of
log(eta / lam). That sum is taken here as part of what lam multiplies: the run then has the published one's errors, and is dense
for two dozen epochs before its cliff, as that was; its end is sparser. Outside of lam (``--sparsify.extra 1e-3``) the sum
outweighs the loss and all but a few weights vanish. The published AdaProx took its proximal step on the validation batches,
too. Run in this folder, so that the recipes find these classes: see docs/methods.md for the command and what came out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_sparse import numeric
from lightning_sparse import optimizer as steps_of
from lightning_sparse.callbacks import AdaptiveProx, EtaTrick
from lightning_sparse.duality import Penalty
from lightning_sparse.methods.proximal import reweighted_step
from lightning_sparse.penalties import LogSum


@dataclass(frozen=True)
class SlippedLogSum(LogSum):
    """f(eta) = 2 (log((S + eps) / (2 eps)) - (S - eps)^2 / (4 eta)), S = sqrt(eps^2 + 4 eta): the second term twice."""

    def dual(self, eta: Tensor) -> Tensor:
        root = (self.eps**2 + 4 * eta).sqrt()
        rise = 4 * eta / (root + self.eps)  # root - eps, without cancellation
        return 2 * (torch.log1p(rise / (2 * self.eps)) - rise * rise / (4 * eta))

    def dual_slope(self, eta: Tensor) -> Tensor:
        return numeric.slope(self.dual, eta)


class SlippedEtaTrick(EtaTrick):
    """EtaTrick with ``extra * sum log(eta / lam)`` added to what it minimises; 1e-6 is the published 1e-3 times lam."""

    def __init__(self, penalty: Penalty, lam: float, extra: float = 1e-6) -> None:
        super().__init__(penalty, lam)
        self.extra = extra

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        for name, _, _ in [] if self.frozen else self.weights.members(optimizer):
            self.method.learned.grad_of(name).add_(self.extra)


class SlippedAdaProx(AdaptiveProx):
    """AdaptiveProx whose step is also taken once for each of the 94 validation batches (12,000 images in batches of 128)."""

    batches = 94

    @torch.no_grad()
    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_validation_end(trainer, pl_module)
        optimizer = trainer.optimizers[0]
        for _, parameter, group in self.weights.members(optimizer):
            rho = steps_of.read_step_size(optimizer, parameter, group, self.metric)
            for _ in range(self.batches):  # the gradients are gone by now, Adam's moments are not
                parameter.copy_(reweighted_step(self.penalty, parameter.detach(), rho * self.lam))
