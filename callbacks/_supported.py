"""Supported: which weights may live, by keep_zeros from the start and by freeze in the last share of a fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_sparse import counts, shards
from lightning_sparse.ascent import FAR, ROUNDS
from lightning_sparse.callbacks import _strengths, _together
from lightning_sparse.callbacks._form import Form
from lightning_sparse.mask_rules.ranked import shrunk


class Supported(Form):
    """A form whose zeros can be held."""

    def _hold_zeros(self, names: Iterable[str]) -> None:
        """Where weights are zero now, they stay so, if that was asked for."""
        if self.keep_zeros:
            self.held |= {name: self._live(name) != 0 for name in names}

    @torch.no_grad()
    def _hold(self, optimizer: torch.optim.Optimizer, support: Mapping[str, Tensor]) -> None:
        if support:
            shards.hold_all((parameter, support[name]) for name, parameter, _ in self._owned(optimizer) if name in support)

    def all_zeros(self) -> dict[str, Tensor]:
        """:meth:`zeros` of every parameter."""
        return _together.zeros(self, {name: self._live(name) for name in self.parameters})

    def share_of_zeros(self) -> float:
        """Of the selected weights, tied ones once, those that count as zero."""
        return counts.share(counts.count_zeros(self.parameters, self.all_zeros()))

    @torch.no_grad()
    def _climb(self) -> bool:
        """On the way to a target sparsity, ROUNDS times; whether it is there."""
        way = self.total * (1 - self.freeze)
        if self.ascent is None or self.frozen or way < _strengths.SHORTEST:  # so short is a fast_dev_run alone
            return False
        if self.step * ROUNDS // way == (self.step - 1) * ROUNDS // way:
            return False
        zeros = self.share_of_zeros()
        self.ascent.climb(zeros, self.step / way)
        return self.ascent.has_arrived(zeros)

    def _say_distance(self) -> None:
        """Warn where the zeros have not followed lam, so that the rank has the last word on more than a few weights."""
        if self.ascent is not None and (reached := self.share_of_zeros()) < self.ascent.target - FAR:
            rank_zero_warn(
                f"{type(self).__name__} had only {reached:.2%} zeros where its support was frozen; to meet target_sparsity="
                f"{self.ascent.target:g} the weights of the smallest keep probability were removed as well. The run was too short for the "
                f"zeros to follow lam (now {self.lam:.3g}): train longer, or start from a lam nearer to that"
            )

    @torch.no_grad()
    def _maybe_freeze(self, arrived: bool = False) -> None:
        if not self.frozen and self.freeze and (arrived or self.step >= round(self.total * (1 - self.freeze))):
            self._say_distance()
            self.support = {}
            self._freeze(self.parameters)

    @torch.no_grad()
    def _freeze(self, names: Iterable[str]) -> None:
        """Where supports are frozen, freeze these parameters' too."""
        support, self.support = self.support, None
        if support is not None and self.attachment is not None:
            self.attachment.restore()
            aimed = self.ascent is not None and not support
            fresh = self._largest(self.ascent.target) if aimed else {name: ~self.zeros(name) for name in names}  # type: ignore[union-attr]
            for name, kept in fresh.items():
                shards.hold(self.parameters[name], kept)
            self.support = support | fresh

    def _largest(self, zeros: float) -> dict[str, Tensor]:
        """The support that leaves this share of zeros: the weights of the largest keep probability, all parameters together."""
        alpha = {name: shards.full(self.keep_probability(name)) for name in self.parameters}
        everywhere = {name: torch.ones_like(whole, dtype=torch.bool) for name, whole in alpha.items()}
        counted = {name: alpha[name] for name in counts.distinct(self.parameters)}  # what is tied to one of them is cleared with it
        kept = everywhere | shrunk(counted, everywhere, zeros)
        return {name: self._part(name, whole) for name, whole in kept.items()}

    def _part(self, name: str, whole: Tensor) -> Tensor:
        parameter = self.parameters[name]
        return shards.like(shards.part(whole.to(parameter.device), parameter), parameter)

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
