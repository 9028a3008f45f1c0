"""Provide the training methods: what each does at every moment of a step, and its formulas. Torch only.

The callbacks, or a loop of plain torch (``tests/methods``), call a method's moments during a run.
"""

from lightning_sparse.methods.base import Method, Run, Step
from lightning_sparse.methods.eta_trick import EtaTrick
from lightning_sparse.methods.gradient import LossTerm, ReweightedGradient
from lightning_sparse.methods.learned_noise import HardConcrete, VariationalDropout
from lightning_sparse.methods.mask import Mask
from lightning_sparse.methods.proximal import Proximal
from lightning_sparse.methods.pruning import MagnitudePruning

__all__ = [
    "EtaTrick",
    "HardConcrete",
    "LossTerm",
    "MagnitudePruning",
    "Mask",
    "Method",
    "Proximal",
    "ReweightedGradient",
    "Run",
    "Step",
    "VariationalDropout",
]
