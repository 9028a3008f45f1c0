"""PenaltyLoss: the penalty as a term of the loss."""

from __future__ import annotations

from lightning_sparse.callbacks.reweighted_penalty import ReweightedPenalty
from lightning_sparse.methods.gradient import LossTerm


class PenaltyLoss(ReweightedPenalty):
    """Descends on ``L + lam * Omega(w)``: the term's gradient is autograd's, from ``omega`` alone (the paper's LogSum row).

    It is taken once an optimiser step, also where several batches are accumulated or several losses share one, and added
    to the task's before clipping: the same gradient as of a term in the loss. The logged loss stays the task's;
    ``sparsity/penalty`` logs the term. ReweightedPenalty gives the same steps from eta_hat, and is quicker.
    """

    compiles = False

    def _make_method(self) -> LossTerm:
        return LossTerm(self.penalty)
