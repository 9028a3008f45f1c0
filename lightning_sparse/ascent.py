"""The old place of :mod:`lightning_sparse.target`."""

from __future__ import annotations

from lightning_sparse.target import FAR, NEAR, RISE, ROUNDS, START, TargetSparsity

Ascent = TargetSparsity

__all__ = ["FAR", "NEAR", "RISE", "ROUNDS", "START", "Ascent"]
