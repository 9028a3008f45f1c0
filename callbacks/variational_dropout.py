"""VariationalDropout: learned Gaussian noise."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch.nn import Parameter

from lightning_sparse import methods, penalties
from lightning_sparse.callbacks.form import SparsityCallback, forwarded
from lightning_sparse.callbacks.sparsifier import Sparsifier
from lightning_sparse.duality import Penalty
from lightning_sparse.per_label import PerLabel
from lightning_sparse.schedules import START, Schedule, as_schedule

Place = Literal["weight", "local", "additive"]


class VariationalDropout(Sparsifier):
    """Each weight is trained with Gaussian noise of a variance w^2 / eta that is learned and paid for (VarDrop).

    It descends on ``mean loss + kl_weight * sum f(eta) / 2``, f / 2 being the divergence from a prior. With N labels in the
    training set and the evidence bound, ``kl_weight`` is 1/N; c/N prunes more for c > 1. N counts what the loss averages over:
    samples, but tokens in a language model, windows in a forecast, pixels in a segmentation, not the rows that hold them. A
    weight is zero where 1 / (1 + 1/eta) < tol.

    Args:
        kl_weight: a number or a schedule, such as LinearWarmup(1.7e-5, share=0.5); what it starts at, with target_sparsity.
            None is 1/N, found at the first step: the labels that its losses average over, times the batches of an epoch. It rises
            from 0 over the first half of the run, and where the mean training loss rises above the best one by more than a fifth
            of what training has gained it is held back until that is over (``sparsity/lam`` is what is in force). A weight that
            is given is held back under SGD alone, where the loss becomes worse than at the start, on its way to NaN.
        prior: "log_uniform" (exact), "molchanov" (the usual fit to it, a little quicker) or "empirical_bayes".
        noise: "weight": one draw a batch for each weight, parameters (w, log eta); "local": the same noise on the outputs
            of Linear and ConvNd layers, a draw a sample (LR); "additive": as "local" with the parameters (w, log sigma),
            eta = w^2 / sigma^2, whose gradient does not grow with the noise (LR+AR).
        target_sparsity: the share of zeros to reach, in place of a kl_weight to guess, which then starts at ``kl_weight`` (1e-5 by
            default), stays there and is logged as ``sparsity/lam``. The zeros that it does not make in time are removed by rank along a
            ramp. The support is frozen as soon as the target is met, after 0.8 of the share ``1 - freeze`` of the run (``freeze`` is
            then 0.25 where it is 0, or 0.7 in a network that was trained before).
        learned_lr: the learning rate of log eta or log sigma, under the weights' schedule; None is the weights' own.
        log_start: what log sigma ("additive") or -log eta (the others) starts at.

    As a penalty it is kl_weight * Omega(w / sqrt(kl_weight)) at unit curvature, Omega the prior's: that is what to_penalty()
    and to_prox() use; to_mask() has the noise follow |w| instead of learning it. In a deep network the noise's own
    penalty is weighted by the curvature.
    Source: Molchanov, Ashukha, Vetrov, arXiv 1701.05369; empirical Bayes: Kharitonov et al., arXiv 1811.00596.
    """

    method_type, own_arguments = methods.VariationalDropout, ("prior", "noise", "learned_lr", "log_start")
    fills = ("penalty", "lam")
    instead = {"penalty": "its penalty follows from prior", "lam": "its strength is kl_weight"}  # for errors
    method: methods.VariationalDropout
    learned: dict[str, Parameter] = forwarded("method.learned.values", "The log eta, or log sigma, of each weight, by parameter name.")

    def __init__(
        self,
        kl_weight: float | Schedule | None = None,
        prior: str = "log_uniform",
        *,
        noise: Place = "additive",
        learned_lr: float | None = None,
        log_start: float = -5.0,
        **options: Any,
    ) -> None:
        self.prior, self.noise, self.learned_lr, self.log_start = prior, noise, learned_lr, log_start
        self._finds_weight = kl_weight is None and options.get("target_sparsity") is None
        schedule = as_schedule(START if kl_weight is None else kl_weight, "kl_weight")
        super().__init__(penalties.Scaled(penalties.VariationalDropout(prior), math.sqrt(schedule.lam)), schedule, **options)

    def _make_method(self, penalty: Penalty) -> methods.VariationalDropout:
        per_label = PerLabel() if self._finds_weight else None
        divergence = penalties.VariationalDropout(self.prior)
        return methods.VariationalDropout(penalty, divergence, self.noise, self.learned_lr, self.log_start, per_label)

    def _shared(self) -> dict[str, Any]:
        return super()._shared() | {"penalty": self.method.penalty}  # that of the weight that was found

    def settings(self) -> dict[str, Any]:
        return {"kl_weight": None if self._finds_weight else self.schedule, **super().settings()}

    def _convert(self, name: str, changes: dict[str, Any]) -> SparsityCallback:
        if self.method.per_label is not None and self.method.per_label.is_open and "lam" not in changes:
            raise ValueError(
                f"{type(self).__name__} finds its kl_weight at the first training step, so that {name} has no lam yet; "
                "give lam=, or kl_weight: 1 / the number of labels in the training set"
            )
        return super()._convert(name, changes)
