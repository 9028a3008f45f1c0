"""Define HardConcrete, which trains weights behind learned gates (L0)."""

from __future__ import annotations

import math
from typing import Any

from torch.nn import Parameter

from lightning_sparse import methods, penalties
from lightning_sparse.callbacks.form import forwarded
from lightning_sparse.callbacks.options import start_of
from lightning_sparse.callbacks.sparsifier import Sparsifier
from lightning_sparse.duality import Penalty
from lightning_sparse.gates import Gate
from lightning_sparse.schedules import Schedule


class HardConcrete(Sparsifier):
    """Trains each weight behind a hard concrete gate whose log alpha is learned (L0 regularisation).

    It minimises ``loss + (lam / 2) * sum P(s > 0)``, so ``lam`` is twice the usual L0 weight. Published L0 weights are often
    given as a number divided by the size of the data: that size counts the labels which the loss averages over (samples; tokens,
    windows or pixels), not rows. The gate is applied as the mask s / E s, of mean 1: the module's weights are evaluated as they are,
    without the gate, and a weight is zero if alpha = (E s)^2 / E s^2 is below ``tol``.

    Args:
        lam: strength, a number or a Schedule; twice the usual L0 weight.
        beta: the gate's temperature.
        gamma: the lower end that the gate is stretched to, below 0.
        zeta: the upper end that the gate is stretched to, above 1.
        learned_lr: the learning rate of log alpha, which follows the weights' schedule; None uses the weights' own.
        log_start: the initial log alpha; 2 keeps a weight with probability 0.97.

    As a penalty it is lam * Omega(w / sqrt(lam)) at unit curvature, with Omega = penalties.HardConcrete, which to_penalty(),
    to_prox() and to_mask() use.
    Source: Louizos, Welling, Kingma, arXiv 1712.01312.
    """

    method_type, own_arguments = methods.HardConcrete, ("beta", "gamma", "zeta", "learned_lr", "log_start")
    instead = {"penalty": "its penalty follows from beta, gamma and zeta"}  # for errors
    fills = ("penalty",)
    learned: dict[str, Parameter] = forwarded("method.learned.values", "The log alpha of each weight, by parameter name.")

    def __init__(
        self,
        lam: float | Schedule | None = None,
        *,
        beta: float = 2 / 3,
        gamma: float = -0.1,
        zeta: float = 1.1,
        learned_lr: float | None = None,
        log_start: float = 2.0,
        **options: Any,
    ) -> None:
        schedule = start_of(type(self).__name__, lam, options.get("target_sparsity"))
        self.beta, self.gamma, self.zeta, self.learned_lr, self.log_start = beta, gamma, zeta, learned_lr, log_start
        penalty = penalties.Scaled(penalties.HardConcrete(beta, gamma, zeta), math.sqrt(schedule.lam))
        super().__init__(penalty, schedule, **options)

    def _make_method(self, penalty: Penalty) -> methods.HardConcrete:
        return methods.HardConcrete(penalty, Gate(self.beta, self.gamma, self.zeta), self.learned_lr, self.log_start)
