"""Define AdaptiveProx, the proximal method."""

from __future__ import annotations

from typing import Any

from lightning_sparse.callbacks.sparsifier import Sparsifier
from lightning_sparse.duality import MaskRule, Penalty
from lightning_sparse.methods.proximal import Metric, Proximal
from lightning_sparse.schedules import Schedule


class AdaptiveProx(Sparsifier):
    """Applies ``w <- w / (1 + rho lam / eta_hat(w))`` after each optimiser step (AdaProx), or the exact prox of rho lam omega.

    Args:
        metric: how the step size rho_j is found. "plain" is the learning rate, "adam" is lr / (sqrt(v_hat_j) + eps) as in Adam's own
            step. "auto" is the optimiser's own step size: read from the state of torch's optimisers, measured from the steps of
            others, and multiplied by the factor by which SGD's or RMSprop's momentum lengthens steps.
        exact: apply the exact prox, which reaches zeros by itself, instead of the reweighted step.
    """

    method_type, own_arguments = Proximal, ("metric", "exact")

    def __init__(
        self,
        penalty: Penalty | MaskRule,
        lam: float | Schedule | None = None,
        *,
        metric: Metric = "auto",
        exact: bool = False,
        **options: Any,
    ) -> None:
        self.metric, self.exact = metric, exact
        super().__init__(penalty, lam, **options)

    def _make_method(self, penalty: Penalty) -> Proximal:
        return Proximal(penalty, self.metric, self.exact)
