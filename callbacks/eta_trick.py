"""EtaTrick: the joint form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_sparse import _checks, duality
from lightning_sparse._pieces import pieces
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

    def eta(self, name: str, w: Tensor) -> Tensor:
        """The learned eta."""
        return self.value(name, w).exp().to(w.dtype)

    def at_rest(self, name: str, w: Tensor) -> Tensor:
        """Where the weight, and the one that its eta stands for, only oscillate: the pull is eta's, which follows the weight."""
        return super().at_rest(name, w) & super().at_rest(name, duality.magnitude(self.penalty, self.eta(name, w)))

    @torch.no_grad()
    def before_step(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        strength = self.lam * _steps.scale(trainer, optimizer)
        for name, parameter, group in self._owned(optimizer):
            if parameter.grad is not None:
                sign = -1 if group.get("maximize") else 1
                self._pay(name, parameter.grad, sign * strength)

    def _pay(self, name: str, grad: Tensor, strength: float) -> None:
        for w, log_eta, in_w, in_log_eta in pieces(self._live(name), self.learned[name].detach(), grad, self.grad_of(name)):
            slopes = duality.joint_slopes(self.penalty, w, log_eta)
            in_w.add_(slopes[0], alpha=strength)
            in_log_eta.add_(slopes[1], alpha=strength)

    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        _steps.check_hooked(self, optimizer)
        super()._stepped(optimizer)
