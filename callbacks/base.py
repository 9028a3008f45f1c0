"""Sparsifier: when things happen in a fit; what they compute is elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_sparse import archive, attach, shards
from lightning_sparse.callbacks import _averages, _faults, _joining, _ranks, _recipes, _refusals, _report, _states
from lightning_sparse.callbacks._form import Form


class Sparsifier(Form):
    """Base of the callbacks that train a network to true zeros: their life cycle. The arguments are Form's."""

    @property
    def state_key(self) -> str:
        return self._generate_state_key(select=self.select)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if type(self) is Sparsifier:
            raise TypeError("Sparsifier is what the forms share and trains no zeros; use ReweightedPenalty, AdaptiveProx or AdaptiveMask")
        if stage == "fit":
            self._close()
            self._let_averages_go()
            self._forget()
            _averages.stand_first(self, trainer)
            _refusals.check_run(self, trainer)
            if not _refusals.is_built_later(pl_module):
                self.parameters = _joining.choose(self, trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.parameters = _joining.choose(self, trainer, pl_module, self._restored)
        _refusals.check_optimizers(self, trainer)
        _refusals.check_overlap(self, trainer)
        _refusals.say_left_out(self, pl_module)
        self.check_form(trainer, pl_module)
        _ranks.check_start(self, trainer)
        self._manual = not pl_module.automatic_optimization
        self._attach(trainer, pl_module)
        self._hold_zeros(self.parameters)
        if self._restored is not None:
            self._resume(self._restored)
        _report.start(self, trainer)

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hang on the module, its averages and its optimisers; again when parameters join."""
        self._close()
        self._let_averages_go()
        self._seen = _joining.signature(self, trainer)
        self._optimizers = [optimizer for optimizer in trainer.optimizers if self._owned(optimizer)] or trainer.optimizers[:1]
        self._places = _joining.places(self.parameters, self._optimizers)
        self.attachment = attach.Attachment(pl_module, self.parameters, self.thresholded)
        self._averages = _averages.Averages(self, trainer)
        self._handles = [optimizer.register_step_post_hook(partial(self._after, trainer)) for optimizer in self._optimizers]
        self._install(pl_module, self.attachment)

    def _install(self, pl_module: LightningModule, attachment: attach.Attachment) -> None:
        """What a form hangs on the module beyond that; nothing by default."""

    def _admit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Parameters that became trainable in the middle of a run take part from here on."""
        new = _joining.newcomers(self, trainer, pl_module)
        if new or _joining.signature(self, trainer) != self._seen:
            self.parameters |= new
            _refusals.check_overlap(self, trainer)
            self._attach(trainer, pl_module)
            self._hold_zeros(new)
            self._freeze(new)

    def check_form(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What a form refuses before training; nothing by default."""

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _faults.check_start(self)
        self._measure(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _ranks.check_batches(self, trainer)
        _faults.check_start(self)
        self._measure(trainer)
        if not self._begun:  # a run that began without this callback has that much less to go
            batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
            self._begin_at(batches if self._manual else trainer.global_step)
        self._begun = True
        self._maybe_freeze()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._averages is not None and self._averages.hand_over_early(trainer):  # an epoch of plain forwards
            self.support = {name: parameter.detach() != 0 for name, parameter in self.parameters.items()}

    def _measure(self, trainer: Trainer) -> None:
        """The run's length; asked for earlier, the Trainer would forget where a stateful loader stood in its epoch."""
        self._whole = _refusals.total_steps(self, trainer)
        self._begin_at(self._offset)

    def _begin_at(self, offset: int) -> None:
        """The callback's own clock starts ``offset`` steps into the run."""
        self._offset, self.total = offset, max(self._whole - offset, 1)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 or _joining.signature(self, trainer) != self._seen:
            self._admit(trainer, pl_module)
        self._batch, self._closures = (batch, batch_idx), 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        self._closures += 1
        _refusals.check_closures(self, pl_module, optimizer, self._closures)
        _faults.check_gradients(self, trainer, optimizer)
        if not self.frozen:
            self.before_step(trainer, optimizer)
        self._clipping.before(trainer, pl_module, (parameter.grad for _, parameter, _ in self._owned(optimizer)))

    def before_step(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        """What a form does to the gradients before they are clipped and the optimiser steps; nothing by default."""

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        _faults.check_loss(self, trainer, loss)

    def _after(self, trainer: Trainer, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        listed = self in trainer.callbacks  # type: ignore[attr-defined] # a tuner's trial run has none, and is undone
        if listed and not is_skipped(optimizer) and not (self._closures == 0 and is_idle(optimizer)):
            self._stepped(optimizer)

    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """After a real optimiser step (not a skipped one, not an accumulation batch)."""
        self._closures = 0
        self._clipping.after(parameter.grad for _, parameter, _ in self._owned(optimizer))
        if self.frozen:
            self._hold(optimizer, self.support or {})
        else:
            self.after_step(optimizer)
            self._hold(optimizer, self.held)
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

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.attachment is not None:
            _faults.check_weights(self)
            self.attachment.restore()
        if not self._averaged:  # else an average is about to take the weights' place
            self._show()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._show()

    def _show(self) -> None:
        if self.attachment is not None and not self.attachment.shown:
            self.attachment.show()

    @property
    def _averaged(self) -> bool:
        """An average takes the weights' place in validation and in files."""
        return self._averages is not None and bool(self._averages.saved)

    def evaluated(self, name: str) -> Tensor:
        swapped = self.attachment is not None and self.attachment.shown  # then the module holds the average, which holds the weights
        average = None if self._averages is None or swapped else self._averages.saved.get(name)
        return self._live(name) if average is None else average.detach().to(self.parameters[name].device)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._averaged and self.attachment is not None:  # the average goes back as it came
            self.attachment.restore()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.attachment is not None:
            self.attachment.restore()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.attachment is not None:
            self.attachment.restore()
        _faults.check_weights(self)  # before a file is written
        _ranks.check_weights(self, trainer)
        _report.epoch(self, trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.prune()
        if self._averages is not None:
            self._averages.hand_over(trainer)
        _report.finish(self, trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._compared:  # this rank has no batches: those that have some wait for its answer
            _ranks.check_batches(self, trainer)
        self.prune()  # a run resumed at its end trains nothing and has no on_train_end
        if self._averages is not None:
            self._averages.prune()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()
        self._let_averages_go()
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

    def _let_averages_go(self) -> None:
        """Not after an exception: a file that is written then holds the average."""
        if self._averages is not None:
            self._averages.detach()

    # -- state --------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the step, and the live values where the file holds the threshold's zeros."""
        if self._restored is not None and not self._applied:  # a tuner saves before on_fit_start
            return self._restored
        taken = {name: shards.picked(self._live(name), self.thresholded(name) == 0) for name in self.parameters}
        clock: dict[str, Any] = {"step": self.step, "offset": self._offset, "begun": self._begun}
        averaged = {} if self._averages is None else self._averages.taken()
        held = {name: shards.full(where).cpu() for name, where in self.held.items()}
        clock |= {"recipe": self.recipe(), "clipped": self._clipping.mean} | ({"held": held} if held else {})
        return clock | {"frozen": self.frozen, "taken": taken} | ({"averaged": averaged} if averaged else {})

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        waiting = self._restored is not None and not self._applied
        if self.attachment is None and self.parameters and not waiting:  # after an exception: the views are gone, the state is not
            attach.write_view(checkpoint["state_dict"], pl_module, self.parameters, self.thresholded)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        _ranks.on_rank_zero(trainer, partial(archive.check, trainer.ckpt_path))
        states = _states.callbacks_of(checkpoint)
        others = (state for state in states.values() if _joining.fits(self, trainer, pl_module, state))
        own = states[self.state_key] if self.state_key in states else next(others, {})
        if self.attachment is None:
            self.parameters = _joining.choose(self, trainer, pl_module, own)
        if self.state_key not in states:  # another form's state of the same parameters carries this one on
            self.load_state_dict(own)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self.check_state(state_dict)
        held = state_dict.get("taken") or state_dict.get("begun")  # not in a file that was written before a fit
        self._restored, self._applied = (state_dict if held else None), False
        if self.attachment is not None and self._restored is not None:
            self._resume(self._restored)

    def check_state(self, state: Any) -> None:
        """Raise ValueError, naming the entry, unless ``state`` is one that this form saves; nothing is used of it yet."""
        _states.check(self, state)

    @torch.no_grad()
    def _resume(self, state: dict[str, Any]) -> None:
        averaged = state.get("averaged", state["taken"])
        if not self._averaged:  # of a file written beside WeightAveraging the module has loaded the average
            state = state | {"taken": averaged}
        _refusals.check_state(self, state)
        _recipes.say_changes(self, state)
        if self.keep_zeros:
            self.held |= {name: self._part(name, held) for name, held in state.get("held", {}).items()}
        self.step, self._begun, self._applied = state["step"], state.get("begun", True), True
        self._begin_at(state["offset"])
        self._clipping.resume(state.get("clipped", 1.0))
        if self._averages is not None:
            self._averages.give_back(averaged)
        for name, taken in state["taken"].items():
            shards.put(self.parameters[name], taken)
        frozen = {name: parameter.detach() != 0 for name, parameter in self.parameters.items()}
        self.support = frozen if state["frozen"] else None

    def _part(self, name: str, whole: Tensor) -> Tensor:
        parameter = self.parameters[name]
        return shards.like(shards.part(whole.to(parameter.device), parameter), parameter)


def is_idle(optimizer: torch.optim.Optimizer) -> bool:
    """At rate 0, as torch's checkpointing steps an optimiser without state under FSDP2, to learn what its state will be."""
    return all(float(group.get("lr", 1.0)) == 0 for group in optimizer.param_groups)


def is_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """A fused optimiser is called for a step that its GradScaler skips, too, and told so by ``found_inf``."""
    return float(getattr(optimizer, "found_inf", None) or 0) > 0
