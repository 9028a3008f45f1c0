"""Define SparsityMonitor, which logs how many weights of any model are zero, with or without a sparsity callback."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_sparse import _checks, counts
from lightning_sparse._construction import typed
from lightning_sparse.callbacks import checks, logging, progress, wandb_run
from lightning_sparse.callbacks.compatibility import AnyCallback, CallbackClass
from lightning_sparse.callbacks.form import SparsityCallback, peers_of
from lightning_sparse.callbacks.options import structure_of
from lightning_sparse.callbacks.weight_averaging import averaging
from lightning_sparse.grouped import Groups, groups_within
from lightning_sparse.select import countable
from lightning_sparse.structure import Coupled, Element, Structure


class SparsityMonitor(AnyCallback, metaclass=CallbackClass):
    """Logs ``sparsity/total`` and ``sparsity/<parameter name>``, the share of exact zeros in [0, 1], tied weights once.

    For a dense model, a loaded sparse one, or one pruned by other means. List it after Lightning's ModelPruning, whose
    ``weight_orig`` times ``weight_mask`` it reports as ``weight``. It logs at the end of training epochs (also at the end of fit
    if the last epoch was not logged), and at the end of ``validate`` and ``test`` runs.

    Together with a Sparsifier in fit, the monitor logs only the parameters that the Sparsifier does not select, and not
    ``sparsity/total``: the Sparsifier logs those (zeros after its threshold, over its selection).

    With a structure, also ``sparsity/groups`` and ``sparsity/groups/<name>``: the share of groups that are zero as a whole, for each
    parameter, or each axis of Channels() and Heads(); to W&B, at the end of fit, the table ``sparsity/groups_left``. A Sparsifier
    with groups of its own logs those itself.

    Args:
        select: patterns on parameter names as in every callback here; None is the default selection.
        every_n_epochs: training epochs from one report to the next, at least 1.
        structure: which weights make up a group, see lightning_sparse.structure; Element() and NM() have none. Channels() and Heads()
            are found on the module's ``example_input_array``, or in fit on the first training batch.

    Raises ValueError at the start of a run for a pattern that matches nothing, a model without selectable weights, or weights that
    the structure cannot group.
    """

    def __init__(
        self,
        select: list[str] | None = None,
        every_n_epochs: int = 1,
        structure: Structure = Element(),  # noqa: B008 - frozen
    ) -> None:
        every_n_epochs = _checks.whole("every_n_epochs", every_n_epochs, 1)
        if isinstance(select, str):
            raise TypeError(f"select must be a list of patterns or None, got the string {select!r}; write [{select!r}]")
        self.select, self.every_n_epochs, self.structure = select, every_n_epochs, structure_of(structure)
        self._groups = Groups({})
        self._names: list[str] = []
        self._fresh = False  # the last epoch was logged
        self._warned = False  # of the weights that the selection skips

    def __repr__(self) -> str:
        return typed(self)

    @cached_property
    def state_key(self) -> str:  # cached because the Trainer reads it at every hook
        return self._generate_state_key(select=self.select)

    def figures(self, module: LightningModule, owners: Sequence[SparsityCallback] = ()) -> dict[str, float]:
        """Return the shares, by logged name, of what was selected when the run started, without the parameters of ``owners``."""
        owned = {name for owner in owners for name in owner.parameters}
        weights = dict(counts.weight_in_use(module, name) for name in self._names)
        zeros = counts.count_zeros({name: w for name, w in weights.items() if name not in owned})
        return counts.figures(zeros) | counts.group_figures(self._left(module, owners))

    def _left(self, module: LightningModule, owners: Sequence[SparsityCallback]) -> dict[str, tuple[int, int]]:
        """Return (groups that are not zero, groups) of each parameter or axis."""
        owned = {name: owner for owner in owners for name in owner.parameters}

        def value(name: str) -> Tensor:  # with the zeros of those who have a threshold
            owner = owned.get(name)
            return counts.weight_in_use(module, name)[1] if owner is None else owner.thresholded(name, owner.evaluated(name))

        return self._groups.left(value)

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
        if averaging(trainer):  # because it has copied its average into the module since
            self._log_late(trainer, pl_module)
        if self._groups.parts and wandb_run.wandb_loggers(trainer.loggers):
            members = {leader: self._groups.names(leader) for leader in self._groups.parts}
            wandb_run.log_groups(trainer.loggers, trainer.global_step, self._left(pl_module, peers_of(trainer)), members)

    def _log_late(self, trainer: Trainer, module: LightningModule) -> None:
        """Log outside of the hooks in which Lightning accepts LightningModule.log."""
        logging.log_now(trainer, self._shown(trainer, module))

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
        self._names = [counts.weight_in_use(module, name)[0] for name in countable(module, self.select)]
        self._groups = self._find_groups(trainer, module)
        if not self._warned and not peers_of(trainer):  # because a sparsity callback reports them itself
            checks.warn_counted(type(self).__name__, self.select, module, self._names)
        self._warned = True

    def _find_groups(self, trainer: Trainer, module: LightningModule) -> Groups:
        """Return the groups to report: none if a sparsity callback reports its own."""
        if self.structure.elementwise or any(not owner.structure.elementwise for owner in peers_of(trainer) if trainer.state.fn == "fit"):
            return Groups({})
        if not isinstance(self.structure, Coupled):
            return groups_within(self.structure, counts.distinct(dict(counts.weight_in_use(module, name) for name in self._names)))
        if trainer.state.fn != "fit" and module.example_input_array is None:
            raise ValueError(
                f"SparsityMonitor with structure={self.structure!r} traces the module, but {type(module).__name__} has no example inputs: "
                "set its example_input_array to a batch of inputs, or give structure=Rows()"
            )
        from lightning_sparse import _coupled  # because the tracer takes a while to import

        with torch.inference_mode(False), torch.enable_grad():  # because the tracer follows the graph of gradients
            return _coupled.find(self.structure, module, self._names, progress.example_inputs(trainer, module)).groups

    def _shown(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        """Return what this callback may log in fit: all figures, or those that no Sparsifier reports."""
        owners = peers_of(trainer)
        shown = self.figures(module, owners)
        return {name: value for name, value in shown.items() if not owners or name != "sparsity/total"}

    def _log(self, trainer: Trainer, module: LightningModule, shown: dict[str, float]) -> None:
        # validate() and test() return what is logged
        layers = shown.keys() - {logging.TOTAL, logging.GROUPS} if trainer.state.fn == "fit" else set()
        logging.log(trainer, module, shown, layers, on_step=False, on_epoch=True)
