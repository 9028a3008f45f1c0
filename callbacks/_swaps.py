"""Others that exchange weights: averages shown in validation, and optimisers with train() and eval() modes.

What another callback or the module puts in before the first validation batch is thresholded for the batches and given back
to it unchanged before any on_validation_epoch_end, so that both exchanges nest whatever the order of callbacks is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse import elementwise
from lightning_sparse._digest import digest
from lightning_sparse.callbacks.compatibility import PACKAGES

if TYPE_CHECKING:
    from lightning_sparse.callbacks._form import Form

_STARTS = ("on_validation_start", "on_validation_epoch_start")
_WITHIN = ("on_validation_batch_start", "on_validation_batch_end", *_STARTS, "on_validation_epoch_end", "on_validation_end")


def hooks_of(trainer: Trainer, names: Iterable[str]) -> list[str]:
    """The hooks of these names that the user's callbacks and module have (not those of Lightning and ours), as "Class.hook"."""
    owners = [*trainer.callbacks, trainer.lightning_module]  # type: ignore[attr-defined]
    return [f"{type(owner).__name__}.{name}" for name in names for owner in owners if _is_users(getattr(owner, name, None))]


def _is_users(hook: Any) -> bool:
    where = getattr(hook, "__module__", None) or ""
    return callable(hook) and where.split(".")[0] not in PACKAGES and not where.startswith("lightning_sparse.callbacks")


class Snapshot:
    """A number for each selected parameter's data, by which a later change is noticed.

    ``alone``: of the part that this process holds, without asking the others.
    """

    def __init__(self, callback: Form, alone: bool = False) -> None:
        self._alone = alone
        self._numbers = {name: self._number(parameter.detach()) for name, parameter in callback.parameters.items()}

    def changed(self, callback: Form, name: str) -> bool:
        """The data of a parameter differ from those of the snapshot, or it had none."""
        return self._numbers.get(name) != self._number(callback.parameters[name].detach())

    def differs(self, callback: Form) -> bool:
        """The data of any parameter differ."""
        found = [self.changed(callback, name) for name in callback.parameters]  # all of them: a collective for split ones
        return any(found)

    def _number(self, data: Tensor) -> int:
        part = elementwise.local_part(data)
        number = digest(part, part == 0)
        return int(number if self._alone else elementwise.sum_shards(number, data))


class Swaps:
    """Whether others exchange the weights around the validations of a fit."""

    def __init__(self) -> None:
        self.seen = False
        self._before: Snapshot | None = None

    def begin(self, callback: Form, trainer: Trainer) -> None:
        """At the first moment of a validation."""
        self._before = Snapshot(callback) if not self.seen and hooks_of(trainer, _STARTS) else None

    def look(self, callback: Form) -> None:
        """At the first batch, before weights are thresholded: the user's hooks have put in what is to be evaluated."""
        self.seen |= self._before is not None and self._before.differs(callback)
        self._before = None


def check_undone(callback: Form, trainer: Trainer, module: LightningModule) -> None:
    """RuntimeError where another changed the weights while they were thresholded, which neither side could give back."""
    names = [] if callback.attachment is None else callback.attachment.altered()
    if names:
        users = hooks_of(trainer, _WITHIN) or [f"{type(module).__name__}.validation_step"]
        raise RuntimeError(
            f"{names[:3]} changed during validation while {type(callback).__name__} evaluated the thresholded weights, so that the live "
            f"weights would be lost. Who may have done it: {', '.join(users)}. Exchange weights (or call an optimiser's eval()) in "
            "on_validation_start or on_validation_epoch_start, and back in on_validation_epoch_end or on_validation_end; or do both "
            "inside one hook"
        )


def _with_modes(optimizers: Iterable[Optimizer]) -> Iterator[Any]:
    """The optimisers that hold other weights in training than in evaluation (schedule-free ones), and know in which mode they are."""
    for optimizer in optimizers:
        known = hasattr(optimizer, "train_mode") or all("train_mode" in group for group in optimizer.param_groups)
        if known and callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
            yield optimizer


def train(optimizers: Iterable[Optimizer]) -> None:
    """Switch optimisers to training, before noise is put onto the weights: a later train() then changes nothing."""
    for optimizer in _with_modes(optimizers):
        optimizer.train()


def evaluate(optimizers: Iterable[Optimizer]) -> None:
    """Switch optimisers to evaluation, before zeros are made true: a later eval() then changes nothing."""
    for optimizer in _with_modes(optimizers):
        optimizer.eval()
