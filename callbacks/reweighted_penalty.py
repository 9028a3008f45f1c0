"""Define ReweightedPenalty, which adds the penalty's gradient before each optimiser step."""

from __future__ import annotations

from lightning_sparse.callbacks.sparsifier import Sparsifier
from lightning_sparse.methods.gradient import ReweightedGradient


class ReweightedPenalty(Sparsifier):
    """Adds ``lam * w / eta_hat(w)`` to the gradient before each optimiser step (AdaTikhonov; the penalty's own slope).

    The logged loss is the task's alone. Gradient clipping by the Trainer includes the added gradient. Under manual optimisation
    step the optimisers of ``self.optimizers()``; a step without Lightning's hooks is refused.
    """

    method_type = ReweightedGradient
