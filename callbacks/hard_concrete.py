"""HardConcrete: learned gates (L0)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sparse import _checks, attach, duality, penalties
from lightning_sparse.callbacks import _strengths
from lightning_sparse.callbacks._arguments import Finish
from lightning_sparse.callbacks._learned import rate
from lightning_sparse.callbacks._learned_noise import LearnedNoise
from lightning_sparse.gates import Gate
from lightning_sparse.schedules import Schedule, as_schedule


class HardConcrete(LearnedNoise):
    """Each weight is trained behind a hard concrete gate whose log alpha is learned (L0 regularisation).

    It descends on ``loss + (lam / 2) * sum P(s > 0)``, so that ``lam`` is twice the usual L0 weight. Published weights
    are often given as a number over the size of the data: that counts the labels which the loss averages over (samples; tokens,
    windows or pixels), not rows. The gate acts as the mask
    s / E s of mean 1: the module's weights are the ones that are evaluated, without the gate, and a weight is zero where
    alpha = (E s)^2 / E s^2 falls below ``tol``.

    Args:
        lam: strength, a number or a Schedule; twice the usual L0 weight.
        beta: the gate's temperature.
        gamma: the lower end that the gate is stretched to, below 0.
        zeta: the upper end, above 1.
        learned_lr: the learning rate of log alpha, under the weights' schedule; None is the weights' own.
        log_start: what log alpha starts at; 2 keeps a weight with probability 0.97.

    As a penalty it is lam * Omega(w / sqrt(lam)) at unit curvature, Omega being penalties.HardConcrete: that is what
    to_penalty(), to_prox() and to_mask() use.
    Source: Louizos, Welling, Kingma, arXiv 1712.01312.
    """

    def __init__(
        self,
        lam: float | Schedule | None = None,
        select: Sequence[str] | None = None,
        tol: float = 0.05,
        freeze: float = 0.0,
        threshold: float | None = None,
        gap_samples: int = 0,
        keep_zeros: bool = False,
        target_sparsity: float | None = None,
        beta: float = 2 / 3,
        gamma: float = -0.1,
        zeta: float = 1.1,
        learned_lr: float | None = None,
        log_start: float = 2.0,
        finish: Finish = "keep",
    ) -> None:
        schedule = as_schedule(_strengths.given(type(self).__name__, "lam", lam, target_sparsity))
        penalty = penalties.Scaled(penalties.HardConcrete(beta, gamma, zeta), math.sqrt(schedule.lam))
        super().__init__(penalty, schedule, select, tol, freeze, threshold, gap_samples, keep_zeros, target_sparsity, finish=finish)
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

    def precision(self, w: Tensor, learned: Tensor) -> Tensor:
        return duality.eta(self.gate.keep_probability(learned), 1.0).to(w.dtype)

    # -- noise ------------------------------------------------------------------------------------------------------------

    def draw_weights(self, name: str, attachment: attach.Attachment, generator: torch.Generator) -> None:
        mask, slope = torch.empty_like(self._live(name)), torch.empty_like(self._live(name))

        def draw(mask: Tensor, slope: Tensor, theta: Tensor) -> None:
            drawn = self.gate.mask(theta, generator)
            mask.copy_(drawn[0])
            slope.copy_(drawn[1])

        self.engine.update_([[mask], [slope], [self.learned[name].detach()]], draw, written=2)
        self._slopes[name] = slope
        attachment.multiply(name, mask)

    def hear(self, name: str, grad: Tensor) -> None:
        columns = self.grad_of(name), grad, self._live(name), self._slopes[name]
        self.engine.update_([[column] for column in columns], lambda into, grad, w, slope: into.add_(grad * w * slope))

    def pay(self, name: str, parameter: Tensor, strength: float) -> None:
        self.engine.add_([self.grad_of(name)], [self.learned[name].detach()], self.gate.open_slope, strength / 2)

    def _end_batch(self) -> None:
        super()._end_batch()
        self._slopes = {}
