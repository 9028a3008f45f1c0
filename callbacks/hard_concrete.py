"""HardConcrete: learned gates (L0)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_sparse import _checks, attach, duality, penalties
from lightning_sparse.callbacks import _steps
from lightning_sparse.callbacks._learned import Learned, rate
from lightning_sparse.callbacks._noisy import Noisy
from lightning_sparse.gates import Gate
from lightning_sparse.schedules import Schedule, as_schedule


class HardConcrete(Learned, Noisy):
    """Each weight is trained behind a hard concrete gate whose log alpha is learned (L0 regularisation).

    It descends on ``loss + (lam / 2) * sum P(s > 0)``, so that ``lam`` is twice the usual L0 weight. The gate acts as the mask
    s / E s of mean 1: the module's weights are the ones that are evaluated, without the gate, and a weight is zero where
    alpha = (E s)^2 / E s^2 falls below ``tol``.

    Args:
        beta, gamma, zeta: the gate's temperature and the ends it is stretched to.
        learned_lr: the learning rate of log alpha, under the weights' schedule; None is the weights' own.
        log_start: what log alpha starts at; 2 keeps a weight with probability 0.97.

    As a penalty it is lam * Omega(w / sqrt(lam)) at unit curvature, Omega being penalties.HardConcrete: that is what
    to_penalty(), to_prox() and to_mask() use. The other arguments are :class:`Sparsifier`'s.
    Source: Louizos, Welling, Kingma, arXiv 1712.01312.
    """

    def __init__(
        self,
        lam: float | Schedule,
        select: Sequence[str] | None = None,
        tol: float = 0.05,
        freeze: float = 0.0,
        threshold: float | None = None,
        gap_samples: int = 0,
        keep_zeros: bool = False,
        beta: float = 2 / 3,
        gamma: float = -0.1,
        zeta: float = 1.1,
        learned_lr: float | None = None,
        log_start: float = 2.0,
    ) -> None:
        schedule = as_schedule(lam)
        penalty = penalties.Scaled(penalties.HardConcrete(beta, gamma, zeta), math.sqrt(schedule.lam))
        super().__init__(penalty, schedule, select, tol, freeze, threshold, gap_samples, keep_zeros)
        self.gate = Gate(beta, gamma, zeta)
        self.learned_lr, self.log_start = rate(learned_lr), _checks.between("log_start", log_start, -10, 10)

    def _forget(self) -> None:
        super()._forget()
        self._slopes: dict[str, Tensor] = {}  # of this batch's masks in log alpha

    def settings(self) -> dict[str, Any]:
        shared = {name: value for name, value in self._shared().items() if name != "penalty"}
        gate = {"beta": self.gate.beta, "gamma": self.gate.gamma, "zeta": self.gate.zeta}
        return shared | gate | {"learned_lr": self.learned_lr, "log_start": self.log_start}

    def start(self, name: str, w: Tensor) -> Tensor:
        return torch.full_like(w, self.log_start, dtype=torch.promote_types(w.dtype, torch.float32))

    def _alpha(self, name: str, w: Tensor) -> Tensor:
        return self.gate.keep_probability(self.value(name, w)).to(w.dtype)

    def eta(self, name: str, w: Tensor) -> Tensor:
        """The learned eta, in units of lam as in the other forms."""
        return self.lam * duality.eta(self._alpha(name, w), 1.0)

    def at_rest(self, name: str, w: Tensor) -> Tensor:
        """What is zero, the gate says."""
        return w == 0

    # -- noise ------------------------------------------------------------------------------------------------------------

    def _install(self, pl_module: Any, attachment: attach.Attachment) -> None:
        for name in self.parameters:  # before the mask multiplies the gradient
            attachment.on_gradient(name, partial(self._hear, name))
        super()._install(pl_module, attachment)

    def draw_weights(self, name: str, attachment: attach.Attachment, generator: torch.Generator) -> None:
        mask, slope = self.gate.mask(self.learned[name].detach(), generator)
        self._slopes[name] = slope.to(self._live(name).dtype)
        attachment.multiply(name, mask.to(self._live(name).dtype))

    @torch.no_grad()
    def _hear(self, name: str, grad: Tensor) -> None:
        if self._loud and name in self._slopes:
            self.descend(name, grad * self._live(name) * self._slopes[name], 1.0)

    def _end_batch(self) -> None:
        super()._end_batch()
        self._slopes = {}

    @torch.no_grad()
    def before_step(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        self.reduce_gradients(trainer, optimizer)
        strength = self.lam / 2 * _steps.scale(trainer, optimizer)
        for name, parameter, group in self._owned(optimizer):
            if parameter.grad is not None:
                self.descend(name, self.gate.open_slope(self.learned[name].detach()), -strength if group.get("maximize") else strength)

    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        _steps.check_hooked(self, optimizer)
        super()._stepped(optimizer)
