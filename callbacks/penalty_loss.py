"""Define PenaltyLoss, which adds the penalty as a term of the loss."""

from __future__ import annotations

from lightning_sparse.callbacks.sparsifier import Sparsifier
from lightning_sparse.methods.gradient import LossTerm


class PenaltyLoss(Sparsifier):
    """Minimises ``L + lam * Omega(w)``: autograd computes the term's gradient from ``omega`` alone (the paper's LogSum row).

    The gradient is computed once an optimiser step, also with accumulated batches or several losses, and added to the task's
    gradient before clipping. It equals that of a term in the loss. The logged loss is the task's alone; ``sparsity/penalty`` logs
    the term. ReweightedPenalty takes the same steps from eta_hat, and is faster.
    """

    method_type = LossTerm
