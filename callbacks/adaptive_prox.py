"""AdaptiveProx: the proximal form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_sparse import step_sizes
from lightning_sparse.callbacks._arguments import Finish
from lightning_sparse.callbacks.base import Sparsifier
from lightning_sparse.duality import MaskRule, Penalty
from lightning_sparse.methods.proximal import Metric, Proximal
from lightning_sparse.schedules import Schedule


class AdaptiveProx(Sparsifier):
    """After each optimiser step ``w <- w / (1 + rho lam / eta_hat(w))`` (AdaProx), or the exact prox of rho lam omega.

    Args:
        metric: rho_j is the learning rate ("plain"), lr / (sqrt(v_hat_j) + eps) as in Adam's own step ("adam"), or the
            optimiser's own, whichever it is ("auto"): read from the state of torch's, measured from the steps of others; as many
            times longer as SGD's or RMSprop's momentum makes steps.
        exact: the exact prox, which reaches zeros by itself, in place of the reweighted step.
    """

    compiles = True

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
        if metric not in ("auto", "adam", "plain"):
            raise ValueError(f"metric must be 'auto', 'adam' or 'plain', got {metric!r}")
        self.metric, self.exact = metric, exact
        super().__init__(penalty, lam, select, tol, freeze, threshold, gap_samples, keep_zeros, target_sparsity, compile, finish)

    def own_settings(self) -> dict[str, Any]:
        return {"metric": self.metric, "exact": self.exact}

    def _make_method(self) -> Proximal:
        return Proximal(self.penalty, self.metric, self.exact)

    def check_form(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            for _, parameter, group in self._owned(optimizer):
                self._check_metric(optimizer, parameter, group)
        super().check_form(trainer, pl_module)

    def _check_metric(self, optimizer: torch.optim.Optimizer, parameter: Tensor, group: dict[str, Any]) -> None:
        name = type(optimizer).__name__
        if self.metric == "adam" and not step_sizes.has_second_moments(optimizer, parameter, group):
            raise ValueError(
                f"metric='adam' needs an optimiser with second moments, got {name}: one of torch's, such as AdamW, whose state is read. "
                "Use metric='auto', which measures the step size of others, or metric='plain'"
            )
        if self.metric == "plain" and not isinstance(group.get("lr"), (int, float, Tensor)):
            raise ValueError(f"metric='plain' is the learning rate, but {name} has lr={group.get('lr')!r}; use metric='auto'")

    @property
    def needs_step_sizes(self) -> bool:
        return self.metric == "auto" or super().needs_step_sizes
