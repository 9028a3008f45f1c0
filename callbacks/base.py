"""Sparsifier: when things happen in a fit; what they compute is elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import Parameter

from lightning_sparse import attach
from lightning_sparse.callbacks import _refusals, _report
from lightning_sparse.callbacks._form import Form
from lightning_sparse.select import select as select_parameters


class Sparsifier(Form):
    """Base of the callbacks that train a network to true zeros: their life cycle. The arguments are Form's."""

    @property
    def state_key(self) -> str:
        return self._generate_state_key(select=self.select)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._close()
            self._forget()
            _refusals.check_run(self, trainer)
            if not _refusals.is_built_later(pl_module):
                self.parameters = select_parameters(pl_module, self.select)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.parameters = select_parameters(pl_module, self.select)
        _refusals.check_optimizers(self, trainer)
        _refusals.check_overlap(self, trainer)
        self.check_form(trainer, pl_module)
        self._whole = self.total = _refusals.total_steps(self, trainer)
        self._manual = not pl_module.automatic_optimization
        self._optimizers = [optimizer for optimizer in trainer.optimizers if self._owned(optimizer)]
        self._places = _places(self.parameters, self._optimizers)
        self.attachment = attach.Attachment(pl_module, self.parameters, self.thresholded)
        if self._restored is not None:
            self._resume(self._restored)
        self._handles = [optimizer.register_step_post_hook(self._stepped) for optimizer in self._optimizers]
        _report.start(self, trainer)

    def check_form(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What a form refuses before training; nothing by default."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._restored is None:  # a run that began without this callback has that much less to go
            batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
            self._begin_at(batches if self._manual else trainer.global_step)
        self._maybe_freeze()

    def _begin_at(self, offset: int) -> None:
        """The callback's own clock starts ``offset`` steps into the run."""
        self._offset, self.total = offset, max(self._whole - offset, 1)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch, self._closures = (batch, batch_idx), 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        self._closures += 1
        _refusals.check_closures(self, pl_module, optimizer, self._closures)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        _refusals.check_loss(self, loss)

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """After a real optimiser step (not a skipped one, not an accumulation batch)."""
        self._closures = 0
        if self.frozen:
            self._hold_support(optimizer)
        else:
            self.after_step(optimizer)
        if optimizer is self._optimizers[0] and not self._manual:  # the clock
            self._tick()

    def _tick(self) -> None:
        self.step += 1
        self._maybe_freeze()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._manual:  # how often the user steps is not known: batches are the clock
            self._tick()

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """What a form does to the weights after an optimiser step; nothing by default."""

    @torch.no_grad()
    def _hold_support(self, optimizer: torch.optim.Optimizer) -> None:
        support = self.support or {}
        for name, parameter, _ in self._owned(optimizer):
            parameter.data.masked_fill_(~support[name], 0.0)

    @torch.no_grad()
    def _maybe_freeze(self) -> None:
        if not self.frozen and self.freeze and self.step >= round(self.total * (1 - self.freeze)):
            support = {name: ~self.zeros(name) for name in self.parameters}
            self.prune()
            self.support = support

    @torch.no_grad()
    def prune(self) -> None:
        """Make the zeros of every selected parameter true, for good."""
        if self.attachment is not None:
            self.attachment.restore()
        for name, parameter in self.parameters.items():
            parameter.data.copy_(self.thresholded(name))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.attachment is not None:
            self.attachment.show()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.attachment is not None:
            self.attachment.restore()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.attachment is not None:
            self.attachment.restore()
        _report.epoch(self, trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.prune()
        _report.finish(self, trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()
        self._optimizers, self._places = [], {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if _refusals.saves_on_exception(trainer):  # the view for that file stays until the next setup or teardown
            self._release()
        else:
            self._close()

    def _release(self) -> None:
        """Live weights back; optimisers no longer listened to."""
        if self.attachment is not None:
            self.attachment.restore()
        for handle in self._handles:
            handle.remove()
        self._handles, self._batch = [], None

    def _close(self) -> None:
        """Live weights back, hooks removed."""
        self._release()
        if self.attachment is not None:
            self.attachment.detach()
        self.attachment = None

    # -- state --------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the step, and the live values where the file holds the threshold's zeros."""
        taken = {name: self._live(name)[self.thresholded(name) == 0].cpu() for name in self.parameters}
        return {"step": self.step, "offset": self._offset, "frozen": self.frozen, "taken": taken}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.attachment is None and self.parameters:  # saved after an exception: the views are gone, the state is not
            attach.write_view(checkpoint["state_dict"], pl_module, self.parameters, self.thresholded)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        states = checkpoint.get("callbacks", {})
        self.parameters = self.parameters or select_parameters(pl_module, self.select)
        if self.state_key not in states:  # another form's state of the same parameters carries this one on
            self.load_state_dict(next((state for state in states.values() if _refusals.fits(self, state)), {}))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict if state_dict.get("taken") else None  # a file written outside of a fit holds none
        if self.attachment is not None and self._restored is not None:
            self._resume(self._restored)

    @torch.no_grad()
    def _resume(self, state: dict[str, Any]) -> None:
        _refusals.check_state(self, state)
        self.step = state["step"]
        self._begin_at(state["offset"])
        for name, taken in state["taken"].items():
            parameter = self.parameters[name]
            parameter.data[parameter == 0] = taken.to(parameter)
        frozen = {name: parameter.detach() != 0 for name, parameter in self.parameters.items()}
        self.support = frozen if state["frozen"] else None


def _places(parameters: dict[str, Parameter], optimizers: list[torch.optim.Optimizer]) -> dict[str, tuple[torch.optim.Optimizer, int]]:
    """The optimiser and the number of its group that update each parameter (groups are replaced when a state is loaded)."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    found = ((o, i, p) for o in optimizers for i, group in enumerate(o.param_groups) for p in group["params"])
    return {names[id(p)]: (o, i) for o, i, p in found if id(p) in names}
