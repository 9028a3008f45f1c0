"""Define EtaTrick, which trains weights and eta together."""

from __future__ import annotations

from typing import Any

from torch.nn import Parameter

from lightning_sparse import methods
from lightning_sparse.callbacks.form import forwarded
from lightning_sparse.callbacks.sparsifier import Sparsifier
from lightning_sparse.duality import MaskRule, Penalty
from lightning_sparse.schedules import Schedule


class EtaTrick(Sparsifier):
    """Minimises ``L + (lam / 2) sum (w^2 / eta + f(eta))`` over weights and log eta together.

    Its minimum over eta is ``L + lam * Omega(w)`` (the paper's eta-Trick).

    Args:
        learned_lr: the learning rate of log eta, which follows the weights' schedule; None uses the weights' own.
        keep_start: the initial keep probability 1 / (1 + lam / eta), from which each eta is set. None is 0.9933; with
            target_sparsity, whose lam rises by orders while eta moves slowly, eta starts at eta_hat of the root mean square of the
            parameter's weights.

    The penalty needs a dual with a slope: ridge, whose eta is one number, and the hard threshold are refused.
    """

    method_type, own_arguments = methods.EtaTrick, ("learned_lr", "keep_start")
    learned: dict[str, Parameter] = forwarded("method.learned.values", "The log eta of each weight, by parameter name.")

    def __init__(
        self,
        penalty: Penalty | MaskRule,
        lam: float | Schedule | None = None,
        *,
        learned_lr: float | None = None,
        keep_start: float | None = None,
        **options: Any,
    ) -> None:
        self.learned_lr, self.keep_start = learned_lr, keep_start
        super().__init__(penalty, lam, **options)

    def _make_method(self, penalty: Penalty) -> methods.EtaTrick:
        return methods.EtaTrick(penalty, self.strength.schedule.lam, self.learned_lr, self.keep_start, self.strength.target is not None)
