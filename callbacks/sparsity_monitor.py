"""Logs how many weights of any model are zero, with or without a sparsity callback beside it."""

from __future__ import annotations

from functools import cached_property

from lightning.pytorch import LightningModule, Trainer

from lightning_sparse import _checks, counts
from lightning_sparse._construction import Constructed, typed
from lightning_sparse.callbacks import _logged, _notices
from lightning_sparse.callbacks._averages import averaging
from lightning_sparse.callbacks.base import Sparsifier
from lightning_sparse.callbacks.compatibility import AnyCallback
from lightning_sparse.select import countable


class SparsityMonitor(AnyCallback, metaclass=Constructed):
    """Logs ``sparsity/total`` and ``sparsity/<parameter name>``, the share of exact zeros in [0, 1], tied weights once.

    For a dense model, a loaded sparse one, or one pruned by other means; list it after Lightning's ModelPruning, whose
    ``weight_orig`` times ``weight_mask`` it reports as ``weight``. It logs at the end of training epochs (when the last
    one is not due, once more at the end of fit), and at the end of a validation or test run of its own.

    Beside a Sparsifier in fit, that callback's figures win (zeros after its threshold, over its selection): the monitor
    then logs the other selected parameters and leaves ``sparsity/total`` to it.

    Args:
        select: patterns on parameter names as in every callback here; None is the default selection.
        every_n_epochs: training epochs from one report to the next, at least 1.

    Raises ValueError at the start of a run for a pattern that matches nothing or a model without selectable weights.
    """

    def __init__(self, select: list[str] | None = None, every_n_epochs: int = 1) -> None:
        every_n_epochs = _checks.whole("every_n_epochs", every_n_epochs, 1)
        if isinstance(select, str):
            raise TypeError(f"select must be a list of patterns or None, got the string {select!r}; write [{select!r}]")
        self.select, self.every_n_epochs = select, every_n_epochs
        self._names: list[str] = []
        self._fresh = False
        self._said = False  # what the selection passes over

    def __repr__(self) -> str:
        return typed(self)

    @cached_property
    def state_key(self) -> str:  # the Trainer asks for it at every hook
        return self._generate_state_key(select=self.select)

    def figures(self, module: LightningModule, skip: set[str] | None = None) -> dict[str, float]:
        """The shares by logged name of what was selected when the run started, without the parameters in ``skip``."""
        weights = dict(counts.weight_in_use(module, name) for name in self._names)
        return counts.figures(counts.count_zeros({name: w for name, w in weights.items() if name not in (skip or set())}))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fresh = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._log(trainer, pl_module, self._shown(trainer, pl_module))
            self._fresh = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._fresh:
            self._log_late(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if averaging(trainer):  # another callback has put its average into the module since
            self._log_late(trainer, pl_module)

    def _log_late(self, trainer: Trainer, module: LightningModule) -> None:
        """Outside of the hooks from which Lightning takes logs."""
        _logged.log_now(trainer, self._shown(trainer, module))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._log(trainer, pl_module, self.figures(pl_module))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module, self.figures(pl_module))

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        self._choose(module)
        if not self._said and not any(isinstance(one, Sparsifier) for one in trainer.callbacks):  # type: ignore[attr-defined] # which says it
            _notices.say_counted(self, module, self._names)
        self._said = True

    def _choose(self, module: LightningModule) -> None:
        self._names = [counts.weight_in_use(module, name)[0] for name in countable(module, self.select)]

    def _shown(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        """What this callback may log in fit: all of it, or what a Sparsifier does not report itself."""
        owners = [callback for callback in trainer.callbacks if isinstance(callback, Sparsifier)]  # type: ignore[attr-defined]
        shown = self.figures(module, {name for callback in owners for name in callback.parameters})
        return {name: value for name, value in shown.items() if not owners or name != "sparsity/total"}

    def _log(self, trainer: Trainer, module: LightningModule, shown: dict[str, float]) -> None:
        layers = shown.keys() - {_logged.TOTAL} if trainer.state.fn == "fit" else set()  # validate() and test() return what is logged
        _logged.log(trainer, module, shown, layers, on_step=False, on_epoch=True)
