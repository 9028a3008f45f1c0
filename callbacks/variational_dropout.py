"""VariationalDropout: learned Gaussian noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_sparse import _checks, attach, elementwise, penalties
from lightning_sparse.callbacks import _states, _steps
from lightning_sparse.callbacks._arguments import Finish, Other
from lightning_sparse.callbacks._learned import rate
from lightning_sparse.callbacks._learned_noise import LearnedNoise
from lightning_sparse.callbacks._per_label import PerLabel, batches_of_run
from lightning_sparse.learned_noise import Additive, Multiplicative
from lightning_sparse.schedules import Schedule, as_schedule
from lightning_sparse.target import START

Place = Literal["weight", "local", "additive"]


class VariationalDropout(LearnedNoise):
    """Each weight is trained with Gaussian noise of a variance w^2 / eta that is learned and paid for (VarDrop).

    It descends on ``mean loss + kl_weight * sum f(eta) / 2``, f / 2 being the divergence from a prior. With N labels in the
    training set and the evidence bound, ``kl_weight`` is 1/N; c/N prunes more for c > 1. N counts what the loss averages over:
    samples, but tokens in a language model, windows in a forecast, pixels in a segmentation, not the rows that hold them. A
    weight is zero where 1 / (1 + 1/eta) < tol.

    Args:
        kl_weight: a number or a schedule, such as LinearWarmup(1.7e-5, share=0.5); what it starts at, with target_sparsity.
            None is 1/N, found at the first step: the labels that its losses average over, times the batches of an epoch.
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
        finish: Finish = "keep",
    ) -> None:
        self._per_label = PerLabel() if kl_weight is None and target_sparsity is None else None
        schedule = as_schedule(START if kl_weight is None else kl_weight)
        self.divergence = penalties.VariationalDropout(prior)
        penalty = penalties.Scaled(self.divergence, math.sqrt(schedule.lam))
        super().__init__(penalty, schedule, select, tol, freeze, threshold, gap_samples, keep_zeros, target_sparsity, finish=finish)
        self.prior, self.noise = prior, _checks.one_of("noise", noise, ("weight", "local", "additive"))
        self.kind = Additive() if noise == "additive" else Multiplicative()
        self.learned_lr, self.log_start = rate(learned_lr), _checks.between("log_start", log_start, -30, 30)

    def settings(self) -> dict[str, Any]:
        shared = {name: value for name, value in self._shared().items() if name not in ("penalty", "lam")}
        own = {"noise": self.noise, "learned_lr": self.learned_lr, "log_start": self.log_start}
        return {"kl_weight": None if self._per_label else self.schedule, "prior": self.prior} | shared | own

    # -- a weight that is found -------------------------------------------------------------------------------------------

    def _become(self, form: type[Other], changes: dict[str, Any]) -> Other:
        if self._per_label is not None and self._per_label.is_open and "lam" not in changes:
            raise ValueError(
                f"{type(self).__name__} finds its kl_weight at the first training step, so that {form.__name__} has no lam yet; "
                "give lam=, or kl_weight: 1 / the number of labels in the training set"
            )
        return super()._become(form, changes)

    def _forget(self) -> None:
        super()._forget()
        if self._per_label is not None:
            self._per_label.reset()

    def _take_weight(self, weight: float) -> None:
        self.schedule = as_schedule(weight)
        self.given = self.penalty = penalties.Scaled(self.divergence, math.sqrt(weight))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._per_label is not None and self._per_label.is_open and math.isinf(batches_of_run(trainer, self._whole)):
            raise ValueError(
                f"{type(self).__name__} needs kl_weight: the loader has no length and the run no end, so that the labels of the training "
                "set cannot be counted; give kl_weight=1/N for N labels (tokens, windows, pixels), or max_steps"
            )

    def begin_batch(self, batch: Any) -> None:
        super().begin_batch(batch)
        if self._per_label is not None:
            self._per_label.begin(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        super().on_before_backward(trainer, pl_module, loss)
        if self._per_label is not None:
            self._per_label.listen(loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_after_backward(trainer, pl_module)
        if self._per_label is not None:
            self._per_label.end(_steps.loss_scale(trainer, self._manual))

    def before_step(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        if self._per_label is not None and self._per_label.is_open:
            self._take_weight(self._per_label.settle(trainer, self._whole, type(self).__name__))
        super().before_step(trainer, optimizer)

    # -- what the form uses ---------------------------------------------------------------------------------------------

    @property
    def local(self) -> bool:
        return self.noise != "weight"

    def start(self, name: str, w: Tensor) -> Tensor:
        return torch.full_like(w, self.kind.start(self.log_start), dtype=torch.promote_types(w.dtype, torch.float32))

    def precision(self, w: Tensor, learned: Tensor) -> Tensor:
        return self.kind.eta(w, learned)

    # -- noise ------------------------------------------------------------------------------------------------------------

    def draw_outputs(self, name: str, layer: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
        return self.kind.output_noise(layer, x, self.learned[name].to(self._live(name).dtype), generator)

    def draw_weights(self, name: str, attachment: attach.Attachment, generator: torch.Generator) -> None:
        w = self._live(name)
        draw = elementwise.normal_like(w, generator).mul_(self.kind.deviation(w, self.learned[name].detach()))
        if self.noise == "additive":
            attachment.substitute(name, w + draw)
        else:
            attachment.multiply(name, 1 + draw)

    # -- state ------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        found = {} if self._per_label is None or self._per_label.is_open else {"kl_weight": self._per_label.value}
        return found | super().state_dict()

    def check_state(self, state: Any) -> None:
        super().check_state(state)
        if "kl_weight" in state:
            _states.entry(self, state, "kl_weight", _states.is_factor, "a finite number > 0")

    def _resume(self, state: dict[str, Any]) -> None:
        if self._per_label is not None and "kl_weight" in state:
            self._per_label.value = state["kl_weight"]
            self._take_weight(state["kl_weight"])
        super()._resume(state)

    # -- noise and its price ----------------------------------------------------------------------------------------------

    def hear(self, name: str, grad: Tensor) -> None:
        """The gradient of the noisy weight times what the noise added to it."""
        self.descend(name, grad * self.kind.slope(self.parameters[name].detach() - self._live(name)), 1.0)

    @torch.no_grad()
    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        super()._stepped(optimizer)
        for name, _, _ in self._owned(optimizer):
            self.kind.bound_(self._live(name), self.learned[name].detach())

    def pay(self, name: str, parameter: Tensor, strength: float) -> None:
        columns: Any = parameter.grad, self.grad_of(name), self._live(name), self.learned[name].detach()
        self.engine.update_([[column] for column in columns], self._descend, (strength,), written=2)

    def _descend(self, in_w: Tensor, in_theta: Tensor, w: Tensor, theta: Tensor, strength: float) -> None:
        slopes = self.kind.divergence(self.divergence, w, theta)
        if slopes[0] is not None:
            in_w.add_(slopes[0], alpha=strength)
        in_theta.add_(slopes[1], alpha=strength)
