"""EtaTrick: the joint form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_sparse import _checks, duality
from lightning_sparse import optimizer as steps
from lightning_sparse.callbacks import _refusals, _steps
from lightning_sparse.callbacks._arguments import Finish
from lightning_sparse.callbacks._learned import Learned, rate
from lightning_sparse.duality import MaskRule, Penalty
from lightning_sparse.schedules import Schedule


class EtaTrick(Learned):
    """Descends on weights and log eta together: ``L + (lam / 2) sum (w^2 / eta + f(eta))``, whose minimum over eta is
    ``L + lam * Omega(w)`` (the paper's eta-Trick).

    Args:
        learned_lr: the learning rate of log eta, under the weights' schedule; None is the weights' own.
        keep_start: the keep probability 1 / (1 + lam / eta) that each eta starts at.

    The penalty needs a dual with a slope: ridge, whose eta is one number, and the hard threshold are refused.
    """

    def __init__(
        self,
        penalty: Penalty | MaskRule,
        lam: float | Schedule | None = None,
        select: Sequence[str] | None = None,
        tol: float = 0.05,
        freeze: float = 0.0,
        threshold: float | None = None,
        gap_samples: int = 0,
        keep_zeros: bool = False,
        target_sparsity: float | None = None,
        learned_lr: float | None = None,
        keep_start: float = 0.9933,
        finish: Finish = "keep",
    ) -> None:
        super().__init__(penalty, lam, select, tol, freeze, threshold, gap_samples, keep_zeros, target_sparsity, finish=finish)
        _refusals.check_dual(self.penalty, type(self).__name__)
        self.learned_lr = rate(learned_lr)
        self.keep_start = _checks.between("keep_start", keep_start, 0, 1)

    def own_settings(self) -> dict[str, Any]:
        return {"learned_lr": self.learned_lr, "keep_start": self.keep_start}

    def start(self, name: str, w: Tensor) -> Tensor:
        eta = duality.eta(torch.tensor(self.keep_start, dtype=torch.float64), self.schedule.lam)
        return torch.full_like(w, math.log(eta), dtype=torch.promote_types(w.dtype, torch.float32))

    def terms(self, name: str, w: Tensor) -> tuple[Tensor, ...]:
        """Return w and the learned log eta."""
        return w, self.value(name, w)

    def eta_of(self, *terms: Tensor) -> Tensor:
        """Return the learned eta."""
        w, log_eta = terms
        return log_eta.exp().to(w.dtype)

    def is_at_rest(self, rho: Tensor | float, memory: float, *terms: Tensor) -> Tensor:
        """A weight is at rest only if both |w| and eta_hat^-1(eta) lie in the prox's zero region, because eta lags behind w."""
        lagging = duality.magnitude(self.penalty, self.eta_of(*terms))
        return super().is_at_rest(rho, memory, *terms) & super().is_at_rest(rho, memory, lagging)

    @torch.no_grad()
    def before_step(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        strength = self.lam * steps.grad_scale(getattr(trainer.precision_plugin, "scaler", None), optimizer)
        for sign in (1, -1):
            rows = [
                (parameter.grad, self.grad_of(name), self._live(name), self.learned[name].detach())
                for name, parameter, group in self._owned(optimizer)
                if parameter.grad is not None and bool(group.get("maximize")) == (sign < 0)
            ]
            if rows:
                self.engine.update_(list(zip(*rows, strict=True)), self._descend, (sign * strength,), written=2)

    def _descend(self, in_w: Tensor, in_log_eta: Tensor, w: Tensor, log_eta: Tensor, strength: float) -> None:
        slopes = duality.joint_slopes(self.penalty, w, log_eta)
        in_w.add_(slopes[0], alpha=strength)
        in_log_eta.add_(slopes[1], alpha=strength)

    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        _steps.check_hooked(self, optimizer)
        super()._stepped(optimizer)
