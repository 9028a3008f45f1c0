"""Smaller networks: remove groups that are zero, check that nothing changes, save and load the result. Depends on torch only."""

from __future__ import annotations

from lightning_sparse.shrinking.files import load_shrunk, save_shrunk
from lightning_sparse.shrinking.report import Report
from lightning_sparse.shrinking.selection import GroupScores, choose, remove, share_of
from lightning_sparse.shrinking.shrink import Shrunk, shrink, shrink_and_report
from lightning_sparse.shrinking.stages import Budget, Stages

__all__ = [
    "Budget",
    "GroupScores",
    "Report",
    "Shrunk",
    "Stages",
    "choose",
    "load_shrunk",
    "remove",
    "save_shrunk",
    "share_of",
    "shrink",
    "shrink_and_report",
]
