"""AdaptiveProx: the proximal form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_sparse import _fused, _rates, proximal
from lightning_sparse import optimizer as optimizer_
from lightning_sparse.callbacks import _steps
from lightning_sparse.callbacks._arguments import Finish
from lightning_sparse.callbacks.base import Sparsifier
from lightning_sparse.duality import MaskRule, Penalty
from lightning_sparse.schedules import Schedule

Metric = Literal["auto", "adam", "plain"]


class AdaptiveProx(Sparsifier):
    """After each optimiser step ``w <- w / (1 + rho lam / eta_hat(w))`` (AdaProx), or the exact prox of rho lam omega.

    Args:
        metric: rho_j is the learning rate ("plain"), lr / (sqrt(v_hat_j) + eps) as in Adam's own step ("adam"), or the
            optimiser's own, whichever it is ("auto"): read from the state of torch's, measured from the steps of others; as many
            times longer as SGD's or RMSprop's momentum makes steps.
        exact: the exact prox, which reaches zeros by itself, in place of the reweighted step.
    """

    joins, compiles = True, True

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
        metric: Metric = "auto",
        exact: bool = False,
        compile: bool = False,
        finish: Finish = "keep",
    ) -> None:
        super().__init__(penalty, lam, select, tol, freeze, threshold, gap_samples, keep_zeros, target_sparsity, compile, finish)
        if metric not in ("auto", "adam", "plain"):
            raise ValueError(f"metric must be 'auto', 'adam' or 'plain', got {metric!r}")
        self.metric, self.exact = metric, exact

    def _forget(self) -> None:
        super()._forget()
        self._fused: _fused.Shrinkage | None = None

    def own_settings(self) -> dict[str, Any]:
        return {"metric": self.metric, "exact": self.exact}

    @property
    def oscillates(self) -> bool:
        """The exact prox lands on its zeros by itself."""
        return not self.exact

    def check_form(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            for _, parameter, group in self._owned(optimizer):
                self._check_metric(optimizer, parameter, group)
        if self.compile:
            self._fused = shrinkage = _fused.Shrinkage(self.penalty, self.exact)
            for optimizer in trainer.optimizers:
                for _, parameter, group in self._owned(optimizer):
                    shrinkage.check([parameter], "number" if self.metric == "plain" else optimizer_.kind_of(optimizer, parameter, group))

    def _check_metric(self, optimizer: torch.optim.Optimizer, parameter: Tensor, group: dict[str, Any]) -> None:
        name = type(optimizer).__name__
        if self.metric == "adam" and not optimizer_.has_second_moments(optimizer, parameter, group):
            raise ValueError(
                f"metric='adam' needs an optimiser with second moments, got {name}: one of torch's, such as AdamW, whose state is read. "
                "Use metric='auto', which measures the step size of others, or metric='plain'"
            )
        if self.metric == "plain" and not isinstance(group.get("lr"), (int, float, Tensor)):
            raise ValueError(f"metric='plain' is the learning rate, but {name} has lr={group.get('lr')!r}; use metric='auto'")

    @property
    def needs_step_sizes(self) -> bool:
        return self.metric == "auto" or super().needs_step_sizes

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        lam = self.lam * self._clipping.last  # a clipped step has that much less of a prox, too
        stepped = ((parameter, group, (parameter,)) for _, parameter, group in self._owned(optimizer) if parameter.grad is not None)
        for kind in _steps.alike(optimizer, stepped, self._step_sizes if self.metric == "auto" else None):
            factor = _rates.gain(kind.group) * lam
            for w, *held in _steps.parts(self._joint, self.penalty, kind.columns, written=0, whole=self.compile):
                self._shrink(w, kind.rate_state(held), kind.group, factor)

    def _shrink(self, w: Tensor, state: dict[str, Any], group: dict[str, Any], factor: float) -> None:
        """The prox of step * omega, in place, step being ``factor`` times the optimiser's rate."""
        if self._fused is not None:
            self._fused(w, state, group, self.metric, factor)
            return
        step = proximal.rate(state, group, self.metric, factor)
        if self.exact:
            w.copy_(self.penalty.prox(w, step))
        else:
            proximal.reweighted_step(self.penalty, w, step, out=w)
