"""Subquadratic penalties, one file per family. To add one, write its file and import it here."""

from lightning_sparse.penalties.ard import ARD
from lightning_sparse.penalties.concave import MCP, SCAD
from lightning_sparse.penalties.hard_concrete import HardConcrete
from lightning_sparse.penalties.hard_threshold import HardThreshold
from lightning_sparse.penalties.log_square import LogSquare
from lightning_sparse.penalties.log_sum import LogSum
from lightning_sparse.penalties.lp import L1, Lp, Ridge
from lightning_sparse.penalties.scaled import Scaled
from lightning_sparse.penalties.variational import VariationalDropout

__all__ = [
    "ARD",
    "L1",
    "MCP",
    "SCAD",
    "HardConcrete",
    "HardThreshold",
    "LogSquare",
    "LogSum",
    "Lp",
    "Ridge",
    "Scaled",
    "VariationalDropout",
]
