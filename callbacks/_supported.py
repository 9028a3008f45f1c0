"""Supported: which weights may live, by keep_zeros from the start and by freeze in the last share of a fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_sparse import counts, elementwise
from lightning_sparse.callbacks import _promises, _target
from lightning_sparse.callbacks._form import Form


class Supported(Form):
    """A form whose zeros can be held."""

    def _hold_zeros(self, names: Iterable[str]) -> None:
        """Where weights are zero now, they stay so, if that was asked for."""
        if self.keep_zeros:
            self.held |= {name: self._live(name) != 0 for name in names}

    @torch.no_grad()
    def _hold(self, optimizer: torch.optim.Optimizer, support: Mapping[str, Tensor]) -> None:
        if support:
            elementwise.apply_masks_((parameter, support[name]) for name, parameter, _ in self._owned(optimizer) if name in support)

    def share_of_zeros(self) -> float:
        """Of the selected weights, tied ones once, those that count as zero."""
        return counts.share(counts.count_zeros(self.parameters, self.all_zeros()))

    def unreached(self) -> list[str]:
        """What was promised and has not come by now, a phrase each; empty once the support is frozen."""
        return _promises.unreached(self)

    @property
    def planned_end(self) -> float:
        """The share of the run by which all that was promised has come."""
        return 1 - self.freeze

    @torch.no_grad()
    def _maybe_freeze(self, arrived: bool = False) -> None:
        if not self.frozen and self.freeze and (arrived or self.step >= round(self.total * (1 - self.freeze))):
            _target.say_by_rank(self)
            _promises.freeze(self)

    @torch.no_grad()
    def _freeze(self, names: Iterable[str]) -> None:
        """Where supports are frozen, freeze these parameters' too."""
        support, self.support = self.support, None
        if support is not None and self.attachment is not None:
            self.attachment.restore()
            aimed = self.ascent is not None and not support
            fresh = _target.largest(self, self.ascent.target) if aimed else {name: ~self.zeros(name) for name in names}  # type: ignore[union-attr]
            for name, kept in fresh.items():
                elementwise.apply_mask_(self.parameters[name], kept)
            self.support, self.cut = support | fresh, {}

    def _part(self, name: str, whole: Tensor) -> Tensor:
        parameter = self.parameters[name]
        return elementwise.shard_like(elementwise.cut_like(whole.to(parameter.device), parameter), parameter)

    @torch.no_grad()
    def prune(self) -> None:
        """Make the zeros of every selected parameter true, for good."""
        if self.attachment is not None:
            self.attachment.restore()
        zeros = self.all_zeros()
        for name, parameter in self.parameters.items():
            parameter.data.copy_(parameter.detach().masked_fill(zeros[name], 0.0))
        if self.attachment is not None:
            self.attachment.renew()
