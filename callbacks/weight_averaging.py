"""Support others that exchange weights: averages, exchanges around validation, and optimisers with train() and eval() modes.

WeightAveraging (EMA) swaps its average into the module for validation, saves it as a file's ``state_dict`` and copies it into the
module when training ends. StochasticWeightAveraging uses its average only when training ends. Both average the live weights, without
a threshold; the average is thresholded when it is evaluated, saved and copied into the module.

Weights that another callback or the module swaps in before the first validation batch are thresholded during the batches and restored
unchanged before any on_validation_epoch_end, so that both exchanges nest in any order of callbacks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse import elementwise
from lightning_sparse._digest import digest
from lightning_sparse.callbacks.compatibility import PACKAGES, those_of
from lightning_sparse.callbacks.form import SparsityCallback
from lightning_sparse.support import Support
from lightning_sparse.weights import Attachment, WeightStore

_SWAPPING, _KEEPING = "WeightAveraging", "StochasticWeightAveraging"


def averaging(trainer: Trainer) -> list[Any]:
    """Return the callbacks that keep an average of the weights."""
    return those_of(trainer, _SWAPPING, _KEEPING)


def swapping(trainer: Trainer) -> Any | None:
    """Return the WeightAveraging callback that has an average; None if there is none."""
    return next((one for one in those_of(trainer, _SWAPPING) if one._average_model is not None), None)


def saved_module(trainer: Trainer, module: LightningModule, weights_only: bool = False) -> nn.Module:
    """Return the module that a file's ``state_dict`` holds: WeightAveraging's average if there is one, except in weights-only files."""
    keeper = None if weights_only else swapping(trainer)
    averaged: nn.Module = module if keeper is None else keeper._average_model.module
    return averaged


def move_to_front(callback: Callback, trainer: Trainer) -> None:
    """Move ``callback`` ahead of all non-sparsity callbacks, so that live weights are restored before another callback reads them."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    place = next((at for at, one in enumerate(callbacks) if not isinstance(one, SparsityCallback)), len(callbacks))
    if place < callbacks.index(callback):  # a new list, because the Trainer is iterating over the old one
        rest = [one for one in callbacks if one is not callback]
        trainer.callbacks = rest[:place] + [callback] + rest[place:]  # type: ignore[attr-defined]


class Averages:
    """Prunes the averages of the selected weights that other callbacks keep in this run."""

    def __init__(self, weights: WeightStore, support: Support, trainer: Trainer) -> None:
        ema = swapping(trainer)
        self.weights, self.support = weights, support
        self._swa = those_of(trainer, _KEEPING)
        self._ema: nn.Module | None = None if ema is None else ema._average_model.module
        self.saved: dict[str, nn.Parameter] = {} if self._ema is None else self._of(self._ema)  # averages that files hold
        self._view = None if self._ema is None else Attachment(self._ema, self.saved, self.thresholded)

    def _of(self, module: nn.Module) -> dict[str, nn.Parameter]:
        known = dict(module.named_parameters(remove_duplicate=False))
        return {name: known[name] for name in self.weights.parameters if name in known}

    def evaluated(self, name: str) -> Tensor:
        """Return the values of a parameter that are evaluated and saved, before the threshold: an average if one replaces it."""
        shown = self.weights.attachment is not None and self.weights.attachment.shown  # then the module holds the average
        average = None if shown else self.saved.get(name)
        return self.weights.live(name) if average is None else average.detach().to(self.weights.parameters[name].device)

    def thresholded(self, name: str) -> Tensor:
        """Return a saved average with true zeros."""
        return self._sparse(name, self.saved[name])

    def _sparse(self, name: str, average: nn.Parameter) -> Tensor:
        """Return any average with true zeros; it may live on another device."""
        return self.support.thresholded(name, average.detach().to(self.weights.parameters[name].device)).to(average.device)

    def pruned_values(self) -> dict[str, Tensor]:
        """Return the saved averages' values at the zeros that the threshold writes to their file."""
        return {name: average.detach()[self.thresholded(name) == 0].cpu() for name, average in self.saved.items()}

    @torch.no_grad()
    def restore_values(self, taken: dict[str, Tensor]) -> None:
        """Restore the values that the threshold removed from a loaded average."""
        for name, average in self.saved.items():
            average.data[average == 0] = taken[name].to(average)

    @torch.no_grad()
    def prune(self) -> None:
        """Set the zeros of the saved averages permanently."""
        for name, average in self.saved.items():
            average.data.copy_(self.thresholded(name))

    def copy_to_module(self, trainer: Trainer) -> None:
        """Copy, when training ends, pruned averages into the module before the averaging callbacks copy theirs."""
        for module in [self._ema] * (self._ema is not None) + [one._average_model for one in self._swa if _copies_average(one, trainer)]:
            self._copy(module)

    def copy_before_batch_norm(self, trainer: Trainer) -> bool:
        """Copy them before the epoch in which StochasticWeightAveraging updates batch norm; return True if there are any."""
        due = [one._average_model for one in self._swa if _updates_batch_norm(one, trainer)]
        for module in due:
            self._copy(module)
        return bool(due)

    @torch.no_grad()
    def _copy(self, module: nn.Module) -> None:
        for name, average in self._of(module).items():
            average.data.copy_(self._sparse(name, average))
            self.weights.parameters[name].data.copy_(average)

    def detach(self) -> None:
        """Remove the view."""
        if self._view is not None:
            self._view.detach()


def extra_epochs(trainer: Trainer) -> int:
    """Return the epochs that StochasticWeightAveraging adds to a run with batch norm, to update its statistics."""
    return sum(bool(one._model_contains_batch_norm) and one._max_epochs != -1 for one in those_of(trainer, _KEEPING))


def _copies_average(swa: Any, trainer: Trainer) -> bool:
    if swa._average_model is None or (swa._model_contains_batch_norm and trainer.current_epoch - 1 == swa.swa_end + 1):
        return False
    return bool(trainer.current_epoch - 1 == swa.swa_end or swa._max_epochs == -1)


def _updates_batch_norm(swa: Any, trainer: Trainer) -> bool:
    return bool(swa._model_contains_batch_norm and swa._max_epochs != -1 and trainer.current_epoch == swa.swa_end + 1)


# -- exchanges around validation -------------------------------------------------------------------------------------------


def hooks_of(trainer: Trainer, names: Iterable[str]) -> list[str]:
    """Return the hooks of these names that the user's callbacks and module define (not Lightning's and ours), as "Class.hook"."""
    owners = [*trainer.callbacks, trainer.lightning_module]  # type: ignore[attr-defined]
    return [f"{type(owner).__name__}.{name}" for name in names for owner in owners if _is_users(getattr(owner, name, None))]


def _is_users(hook: Any) -> bool:
    where = getattr(hook, "__module__", None) or ""
    return callable(hook) and where.split(".")[0] not in PACKAGES and not where.startswith("lightning_sparse.callbacks")


class Snapshot:
    """Stores a checksum of each selected parameter's data, to detect later changes.

    ``alone`` covers only the part that this process holds, without communication.
    """

    def __init__(self, weights: WeightStore, alone: bool = False) -> None:
        self.weights, self._alone = weights, alone
        self._numbers = {name: self._number(parameter.detach()) for name, parameter in weights.parameters.items()}

    def changed(self, name: str) -> bool:
        """Return True if the data of a parameter differ from those of the snapshot, or it had none."""
        return self._numbers.get(name) != self._number(self.weights.parameters[name].detach())

    def differs(self) -> bool:
        """Return True if the data of any parameter differ."""
        found = [self.changed(name) for name in self.weights.parameters]  # all parameters, because split ones need a collective
        return any(found)

    def _number(self, data: Tensor) -> int:
        part = elementwise.local_part(data)
        number = digest(part, part == 0)
        return int(number if self._alone else elementwise.sum_shards(number, data))


def with_modes(optimizers: Iterable[Optimizer]) -> Iterator[Any]:
    """Yield the optimisers that hold other weights in evaluation (schedule-free ones) and know their mode."""
    for optimizer in optimizers:
        known = hasattr(optimizer, "train_mode") or all("train_mode" in group for group in optimizer.param_groups)
        if known and callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
            yield optimizer
