"""PenaltyLoss: the penalty as a term of the loss."""

from __future__ import annotations

from torch import Tensor

from lightning_sparse import numeric
from lightning_sparse.callbacks.reweighted_penalty import ReweightedPenalty


class PenaltyLoss(ReweightedPenalty):
    """Descends on ``L + lam * Omega(w)``: the term's gradient is autograd's, from ``omega`` alone (the paper's LogSum row).

    It is taken once an optimiser step, also where several batches are accumulated or several losses share one, and added
    to the task's before clipping: the same gradient as of a term in the loss. The logged loss stays the task's;
    ``sparsity/penalty`` logs the term. ReweightedPenalty gives the same steps from eta_hat, and is quicker.
    """

    def slope(self, w: Tensor) -> Tensor:
        return numeric.slope(self.penalty.omega, w)
