"""Provide the old import path of ``lightning_sparse.schedules.TargetSparsity``."""

from __future__ import annotations

from lightning_sparse.schedules import NEAR, RISE, ROUNDS, START, TargetSparsity

Ascent = TargetSparsity

__all__ = ["NEAR", "RISE", "ROUNDS", "START", "Ascent"]
