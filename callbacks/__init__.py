"""Provide the Lightning callbacks, one for each training method. Installed as ``lightning_sparse.callbacks``."""

if __name__ != "lightning_sparse.callbacks":
    raise ImportError(
        f"this folder was imported as {__name__!r}; it is installed as 'lightning_sparse.callbacks': "
        "run 'pip install -e .' in the project's folder and import it from there"
    )

from lightning_sparse.callbacks.adaptive_mask import AdaptiveMask
from lightning_sparse.callbacks.adaptive_prox import AdaptiveProx
from lightning_sparse.callbacks.best_after_target import BestAfterTarget
from lightning_sparse.callbacks.eta_trick import EtaTrick
from lightning_sparse.callbacks.hard_concrete import HardConcrete
from lightning_sparse.callbacks.magnitude_pruning import MagnitudePruning
from lightning_sparse.callbacks.penalty_loss import PenaltyLoss
from lightning_sparse.callbacks.reweighted_penalty import ReweightedPenalty
from lightning_sparse.callbacks.sparse_checkpoint import SparseCheckpoint
from lightning_sparse.callbacks.sparsifier import Sparsifier
from lightning_sparse.callbacks.sparsify import Sparsify
from lightning_sparse.callbacks.sparsity_monitor import SparsityMonitor
from lightning_sparse.callbacks.variational_dropout import VariationalDropout

__all__ = [
    "AdaptiveMask",
    "AdaptiveProx",
    "BestAfterTarget",
    "EtaTrick",
    "HardConcrete",
    "MagnitudePruning",
    "PenaltyLoss",
    "ReweightedPenalty",
    "SparseCheckpoint",
    "Sparsifier",
    "Sparsify",
    "SparsityMonitor",
    "VariationalDropout",
]
