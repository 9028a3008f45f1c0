"""How far gradient clipping shortens the optimiser's steps, so that the penalty's pull is shortened with them.

Clipping by norm multiplies the whole gradient by a factor, penalty included. Adam divides by second moments of what was
clipped: a pull lam / sqrt(v) that is not multiplied by that factor as well would grow against the loss by its inverse.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_sparse import shards

_KEEP = 0.9  # weight of the past in the mean factor


class Clipping:
    """The factor by which clipping changed the norm of some gradients: at the last step, and in the mean; else 1."""

    def __init__(self) -> None:
        self.last, self.mean = 1.0, 1.0
        self._norm: Tensor | None = None
        self._measured = False

    def before(self, gradients: Iterable[Any]) -> None:
        """Right before gradients are clipped; not called where none are."""
        self._norm = _norm(gradients)

    def after(self, gradients: Iterable[Any]) -> None:
        """After the step that took them."""
        if self._norm is None:
            return
        factor, self._norm = float(_norm(gradients) / self._norm), None
        if math.isfinite(factor) and factor > 0:
            self.last, self.mean = factor, _KEEP * self.mean + (1 - _KEEP) * factor if self._measured else factor
            self._measured = True

    def resume(self, mean: float) -> None:
        """Go on from the mean factor of an interrupted run; 1 may be one that measured nothing."""
        self.mean, self._measured = mean, mean != 1


@torch.no_grad()
def _norm(gradients: Iterable[Any]) -> Tensor:
    squares = [shards.total(shards.local(grad.detach()).float().square().sum(), grad) for grad in gradients if grad is not None]
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt() if squares else torch.ones(())
