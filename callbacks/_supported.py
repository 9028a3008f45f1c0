"""Supported: which weights may live, by keep_zeros from the start and by freeze in the last share of a fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_sparse import shards
from lightning_sparse.callbacks._form import Form


class Supported(Form):
    """A form whose zeros can be held."""

    def _hold_zeros(self, names: Iterable[str]) -> None:
        """Where weights are zero now, they stay so, if that was asked for."""
        if self.keep_zeros:
            self.held |= {name: self._live(name) != 0 for name in names}

    @torch.no_grad()
    def _hold(self, optimizer: torch.optim.Optimizer, support: Mapping[str, Tensor]) -> None:
        for name, parameter, _ in self._owned(optimizer):
            if name in support:
                shards.clear(parameter, ~support[name])

    @torch.no_grad()
    def _maybe_freeze(self) -> None:
        if not self.frozen and self.freeze and self.step >= round(self.total * (1 - self.freeze)):
            self.support = {}
            self._freeze(self.parameters)

    @torch.no_grad()
    def _freeze(self, names: Iterable[str]) -> None:
        """Where supports are frozen, freeze these parameters' too."""
        support, self.support = self.support, None
        if support is not None and self.attachment is not None:
            self.attachment.restore()
            fresh = {name: ~self.zeros(name) for name in names}
            for name, kept in fresh.items():
                shards.clear(self.parameters[name], ~kept)
            self.support = support | fresh

    @torch.no_grad()
    def prune(self) -> None:
        """Make the zeros of every selected parameter true, for good."""
        if self.attachment is not None:
            self.attachment.restore()
        for name, parameter in self.parameters.items():
            parameter.data.copy_(self.thresholded(name))
        if self.attachment is not None:
            self.attachment.renew()
