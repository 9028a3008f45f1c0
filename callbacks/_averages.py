"""Beside Lightning's averaging callbacks: the average has true zeros where it is evaluated, saved and handed over.

WeightAveraging (EMA) swaps its average into the module for validation, saves it as a file's ``state_dict`` and hands it
over when training ends. StochasticWeightAveraging keeps its average to itself until then. Both go on averaging weights
that no threshold touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_sparse import attach
from lightning_sparse.callbacks.compatibility import SparsityCallback, is_a

if TYPE_CHECKING:
    from lightning_sparse.callbacks._form import Form

_SWAPPING, _KEEPING = "WeightAveraging", "StochasticWeightAveraging"


def averaging(trainer: Trainer) -> list[Any]:
    """The callbacks that keep an average of the weights."""
    return [one for one in trainer.callbacks if is_a(one, _SWAPPING) or is_a(one, _KEEPING)]  # type: ignore[attr-defined]


def swapping(trainer: Trainer) -> Any | None:
    """The WeightAveraging callback that has an average, if there is one."""
    found = (one for one in trainer.callbacks if is_a(one, _SWAPPING))  # type: ignore[attr-defined]
    return next((one for one in found if one._average_model is not None), None)


def saved_module(trainer: Trainer, module: LightningModule, weights_only: bool = False) -> nn.Module:
    """The module whose weights a file's ``state_dict`` holds: the average beside WeightAveraging, but for weights-only files."""
    keeper = None if weights_only else swapping(trainer)
    averaged: nn.Module = module if keeper is None else keeper._average_model.module
    return averaged


def stand_first(callback: Callback, trainer: Trainer) -> None:
    """Put ``callback`` before all others but its like: what it changed for a while it gives back before they look or swap."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    place = next((at for at, one in enumerate(callbacks) if not isinstance(one, SparsityCallback)), len(callbacks))
    if place < callbacks.index(callback):  # a new list: the Trainer is walking over the old one
        rest = [one for one in callbacks if one is not callback]
        trainer.callbacks = rest[:place] + [callback] + rest[place:]  # type: ignore[attr-defined]


class Averages:
    """The averages of a callback's parameters that others keep in this run."""

    def __init__(self, callback: Form, trainer: Trainer) -> None:
        self.callback, ema = callback, swapping(trainer)
        self._swa = [one for one in trainer.callbacks if is_a(one, _KEEPING)]  # type: ignore[attr-defined]
        self._ema: nn.Module | None = None if ema is None else ema._average_model.module
        self.saved: dict[str, nn.Parameter] = {} if self._ema is None else self._of(self._ema)  # what files hold
        self._view = None if self._ema is None else attach.Attachment(self._ema, self.saved, self.thresholded)

    def _of(self, module: nn.Module) -> dict[str, nn.Parameter]:
        known = dict(module.named_parameters(remove_duplicate=False))
        return {name: known[name] for name in self.callback.parameters if name in known}

    def thresholded(self, name: str) -> Tensor:
        """A saved average's values with true zeros."""
        return self._sparse(name, self.saved[name])

    def _sparse(self, name: str, average: nn.Parameter) -> Tensor:
        """The callback's own threshold on an average, which may live on another device."""
        return self.callback.thresholded(name, average.detach().to(self.callback.parameters[name].device)).to(average.device)

    def taken(self) -> dict[str, Tensor]:
        """The saved averages' values where their file holds the threshold's zeros."""
        return {name: average.detach()[self.thresholded(name) == 0].cpu() for name, average in self.saved.items()}

    @torch.no_grad()
    def give_back(self, taken: dict[str, Tensor]) -> None:
        """Undo the threshold of a loaded average."""
        for name, average in self.saved.items():
            average.data[average == 0] = taken[name].to(average)

    @torch.no_grad()
    def prune(self) -> None:
        """Make the zeros of the saved averages true, for good."""
        for name, average in self.saved.items():
            average.data.copy_(self.thresholded(name))

    def hand_over(self, trainer: Trainer) -> None:
        """When training ends: what the averaging callbacks are about to put into the module has true zeros, and is there."""
        for module in [self._ema] * (self._ema is not None) + [one._average_model for one in self._swa if _hands_over(one, trainer)]:
            self._put(module)

    def hand_over_early(self, trainer: Trainer) -> bool:
        """The same, and True, before the epoch in which StochasticWeightAveraging renews the average's batch norms."""
        due = [one._average_model for one in self._swa if _renews_statistics(one, trainer)]
        for module in due:
            self._put(module)
        return bool(due)

    @torch.no_grad()
    def _put(self, module: nn.Module) -> None:
        for name, average in self._of(module).items():
            average.data.copy_(self._sparse(name, average))
            self.callback.parameters[name].data.copy_(average)

    def detach(self) -> None:
        """Undo the view."""
        if self._view is not None:
            self._view.detach()


def extra_epochs(trainer: Trainer) -> int:
    """The epochs that StochasticWeightAveraging adds to a run beside batch norm, to renew its statistics."""
    swa = (one for one in trainer.callbacks if is_a(one, _KEEPING))  # type: ignore[attr-defined]
    return sum(bool(one._model_contains_batch_norm) and one._max_epochs != -1 for one in swa)


def _hands_over(swa: Any, trainer: Trainer) -> bool:
    if swa._average_model is None or (swa._model_contains_batch_norm and trainer.current_epoch - 1 == swa.swa_end + 1):
        return False
    return bool(trainer.current_epoch - 1 == swa.swa_end or swa._max_epochs == -1)


def _renews_statistics(swa: Any, trainer: Trainer) -> bool:
    return bool(swa._model_contains_batch_norm and swa._max_epochs != -1 and trainer.current_epoch == swa.swa_end + 1)
