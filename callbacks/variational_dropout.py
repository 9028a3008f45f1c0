"""VariationalDropout: learned Gaussian noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_sparse import _checks, _draws, attach, penalties
from lightning_sparse._pieces import pieces
from lightning_sparse.callbacks import _strengths
from lightning_sparse.callbacks._learned import rate
from lightning_sparse.callbacks._learned_noise import LearnedNoise
from lightning_sparse.learned_noise import Additive, Multiplicative
from lightning_sparse.schedules import Schedule, as_schedule

Place = Literal["weight", "local", "additive"]


class VariationalDropout(LearnedNoise):
    """Each weight is trained with Gaussian noise of a variance w^2 / eta that is learned and paid for (VarDrop).

    It descends on ``mean loss + kl_weight * sum f(eta) / 2``, f / 2 being the divergence from a prior. With N samples and the
    evidence bound, ``kl_weight`` is 1/N; c/N prunes more for c > 1. A weight is zero where 1 / (1 + 1/eta) < tol.

    Args:
        kl_weight: a number or a schedule, such as LinearWarmup(1.7e-5, share=0.5); what it starts at, with target_sparsity.
        prior: "log_uniform" (exact), "molchanov" (the usual fit to it, a little quicker) or "empirical_bayes".
        noise: "weight": one draw a batch for each weight, parameters (w, log eta); "local": the same noise on the outputs
            of Linear and ConvNd layers, a draw a sample (LR); "additive": as "local" with the parameters (w, log sigma),
            eta = w^2 / sigma^2, whose gradient does not grow with the noise (LR+AR).
        learned_lr: the learning rate of log eta or log sigma, under the weights' schedule; None is the weights' own.
        log_start: what log sigma ("additive") or -log eta (the others) starts at.

    As a penalty it is kl_weight * Omega(w / sqrt(kl_weight)) at unit curvature, Omega the prior's: that is what to_penalty()
    and to_prox() use; to_mask() has the noise follow |w| instead of learning it. In a deep network the noise's own
    penalty is weighted by the curvature.
    Source: Molchanov, Ashukha, Vetrov, arXiv 1701.05369; empirical Bayes: Kharitonov et al., arXiv 1811.00596.
    """

    def __init__(
        self,
        kl_weight: float | Schedule | None = None,
        prior: str = "log_uniform",
        select: Sequence[str] | None = None,
        tol: float = 0.05,
        freeze: float = 0.0,
        threshold: float | None = None,
        gap_samples: int = 0,
        keep_zeros: bool = False,
        target_sparsity: float | None = None,
        noise: Place = "additive",
        learned_lr: float | None = None,
        log_start: float = -5.0,
    ) -> None:
        schedule = as_schedule(_strengths.given(type(self).__name__, "kl_weight", kl_weight, target_sparsity))
        self.divergence = penalties.VariationalDropout(prior)
        penalty = penalties.Scaled(self.divergence, math.sqrt(schedule.lam))
        super().__init__(penalty, schedule, select, tol, freeze, threshold, gap_samples, keep_zeros, target_sparsity)
        self.prior, self.noise = prior, _checks.one_of("noise", noise, ("weight", "local", "additive"))
        self.kind = Additive() if noise == "additive" else Multiplicative()
        self.learned_lr, self.log_start = rate(learned_lr), _checks.between("log_start", log_start, -30, 30)

    def settings(self) -> dict[str, Any]:
        shared = {name: value for name, value in self._shared().items() if name not in ("penalty", "lam")}
        own = {"noise": self.noise, "learned_lr": self.learned_lr, "log_start": self.log_start}
        return {"kl_weight": self.schedule, "prior": self.prior} | shared | own

    # -- what the form uses ---------------------------------------------------------------------------------------------

    @property
    def local(self) -> bool:
        return self.noise != "weight"

    def start(self, name: str, w: Tensor) -> Tensor:
        return torch.full_like(w, self.kind.start(self.log_start), dtype=torch.promote_types(w.dtype, torch.float32))

    def precision(self, name: str, w: Tensor) -> Tensor:
        return self.kind.eta(w, self.value(name, w))

    # -- noise ------------------------------------------------------------------------------------------------------------

    def draw_outputs(self, name: str, layer: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
        return self.kind.output_noise(layer, x, self.learned[name].to(self._live(name).dtype), generator)

    def draw_weights(self, name: str, attachment: attach.Attachment, generator: torch.Generator) -> None:
        w = self._live(name)
        draw = _draws.normal_like(w, generator).mul_(self.kind.deviation(w, self.learned[name].detach()))
        if self.noise == "additive":
            attachment.substitute(name, w + draw)
        else:
            attachment.multiply(name, 1 + draw)

    def hear(self, name: str, grad: Tensor) -> None:
        """The gradient of the noisy weight times what the noise added to it."""
        self.descend(name, grad * self.kind.slope(self.parameters[name].detach() - self._live(name)), 1.0)

    def pay(self, name: str, parameter: Tensor, strength: float) -> None:
        places = self._live(name), self.learned[name].detach(), parameter.grad, self.grad_of(name)
        for w, theta, in_w, in_theta in pieces(*places):  # type: ignore[arg-type]
            slopes = self.kind.divergence(self.divergence, w, theta)
            if slopes[0] is not None:
                in_w.add_(slopes[0], alpha=strength)
            in_theta.add_(slopes[1], alpha=strength)
