"""Sparsifier: when things happen in a fit; what they compute is elsewhere."""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_sparse import _step_hooks, attach
from lightning_sparse import optimizer as steps
from lightning_sparse.callbacks import (
    _averages,
    _best,
    _endings,
    _faults,
    _joining,
    _length,
    _notices,
    _promises,
    _ranks,
    _refusals,
    _report,
    _strengths,
    _swaps,
    _target,
)
from lightning_sparse.callbacks._shown import Shown
from lightning_sparse.methods.base import Step


class Sparsifier(Shown):
    """Base of the callbacks that train a network to true zeros: their life cycle."""

    @cached_property
    def state_key(self) -> str:  # the Trainer asks for it at every hook
        return self._generate_state_key(select=self.select)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if type(self) is Sparsifier:
            raise TypeError("Sparsifier is what the forms share and trains no zeros; use ReweightedPenalty, AdaptiveProx or AdaptiveMask")
        if stage == "fit":
            self._close()
            self._let_averages_go()
            again = _promises.carried(self) if self._fit.goes_on(trainer, pl_module) else None
            self._forget()
            self._restored, self._fit = again, _promises.Fit(trainer, pl_module)
            _averages.stand_first(self, trainer)
            _refusals.check_run(self, trainer)
            if not _refusals.is_built_later(pl_module):
                self.parameters = _joining.choose(self, trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.parameters = _joining.choose(self, trainer, pl_module, self._restored)
        _refusals.check_optimizers(self, trainer)
        _refusals.check_overlap(self, trainer)
        _refusals.say_left_out(self, pl_module)
        _notices.say_coverage(self, trainer, pl_module)
        self.check_form(trainer, pl_module)
        _ranks.check_start(self, trainer)
        self._manual, self._own_hooks = not pl_module.automatic_optimization, _faults.own_hooks(pl_module)
        self._attach(trainer, pl_module)
        self._hold_zeros(self.parameters)
        if self._restored is not None:
            self._resume(self._restored)
        _report.start(self, trainer)

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hang on the module, its averages and its optimisers; again when parameters join."""
        self._close()
        self._members = {}
        self._let_averages_go()
        self._optimizers = [optimizer for optimizer in trainer.optimizers if self._owned(optimizer)] or trainer.optimizers[:1]
        self._places = _joining.places(self.parameters, self._optimizers)
        self.attachment = attach.Attachment(pl_module, self.parameters, partial(_endings.filed, self))
        self._averages = _averages.Averages(self, trainer)
        self._handles = [_step_hooks.around(one, self._before, partial(self._after, trainer)) for one in self._optimizers]
        self._install(pl_module, self.attachment)
        self._seen = _joining.signature(self, trainer)

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
            _notices.say_never_learning(self, new)
            self._freeze(new)

    def check_form(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What a form refuses before training; kernels are made here."""
        if self.compile:
            self.method.compile(self.engine, [(optimizer, self._owned(optimizer)) for optimizer in trainer.optimizers])

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _faults.check_start(self)
        self._measure(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _ranks.check_batches(self, trainer)
        _faults.check_start(self)
        self._measure(trainer)
        if not self._begun:  # a run that began without this callback has that much less to go
            self._begin_at(self._batches(trainer) if self._manual else trainer.global_step)
        begun, self._begun = self._begun, True
        _promises.say_length(self, self._planned)
        self._planned = None
        self._maybe_freeze()
        _notices.say_never_learning(self, () if begun else self.parameters)
        _best.say_unmet(self, trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._averages is not None and self._averages.hand_over_early(trainer):  # an epoch of plain forwards
            self.support = {name: parameter.detach() != 0 for name, parameter in self.parameters.items()}
        drift = _length.drift(trainer, self._batches(trainer) if self._manual else trainer.global_step)
        if drift != self._drift:  # the loader was made anew, with another length
            self._drift = drift
            self._measure(trainer)

    def _measure(self, trainer: Trainer) -> None:
        """The run's length; asked for earlier, the Trainer would forget where a stateful loader stood in its epoch."""
        self._whole = _length.total_steps(self, trainer)
        self._begin_at(self._offset)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined] # which reaches nothing, and is not meant to
            _strengths.check_way(self)

    def _batches(self, trainer: Trainer) -> int:
        """The batches that have been trained on."""
        return int(trainer.fit_loop.epoch_loop.total_batch_idx) + 1

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        _swaps.train(self._optimizers)
        if batch_idx == 0 or _joining.signature(self, trainer) != self._seen:
            self._admit(trainer, pl_module)
        self._batch = (batch, batch_idx)
        self._clock.begin_batch(trainer.global_step)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        _refusals.check_closures(self, pl_module, optimizer, self._clock.prepare(optimizer))
        _faults.check_gradients(self, trainer, optimizer)
        if not self.frozen:
            self.before_step(trainer, optimizer)
        self._watch_steps(optimizer)
        if self._clips(trainer):
            self._clipping.before_clipping(parameter.grad for _, parameter, _ in self._owned(optimizer))

    def _watch_steps(self, optimizer: torch.optim.Optimizer) -> None:
        if self.needs_step_sizes and not self.frozen:
            self._step_sizes.before(optimizer, ((p, group, self._live(name)) for name, p, group in self._owned(optimizer)))

    def _clips(self, trainer: Trainer) -> bool:
        """Gradients are clipped after the callbacks' hook: not in a manual loop, which clips before anything was added."""
        return not self._manual and bool(trainer.gradient_clip_val or "configure_gradient_clipping" in self._own_hooks)

    def before_step(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        """What a form does to the gradients before they are clipped and the optimiser steps."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.method.before_optimizer(self._step(optimizer, steps.grad_scale(scaler, optimizer)))

    def _step(self, optimizer: torch.optim.Optimizer, grad_scale: float = 1.0) -> Step:
        """What the method needs to know of one step of ``optimizer``."""
        sizes, clipped = self._step_sizes, self._clipping.last
        return Step(optimizer, self._owned(optimizer), self.lam, self.engine, self._live, sizes, grad_scale, clipped)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        _faults.check_loss(self, trainer, loss)

    def _before(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimiser's step begins; in automatic optimisation before its forward and backward."""
        self._clock.enter(optimizer)

    def _after(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        listed = self in trainer.callbacks  # type: ignore[attr-defined] # a tuner's trial run has none, and is undone
        skipped = is_skipped(optimizer)
        if listed and not skipped and (self._clock.is_prepared(optimizer) or not is_idle(optimizer)):
            self._stepped(optimizer)
        self._clock.leave(optimizer, stepped=not skipped)

    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """After a real optimiser step (not a skipped one, not an accumulation batch)."""
        self._clipping.after_step(parameter.grad for _, parameter, _ in self._owned(optimizer))
        if self.needs_step_sizes and not self.frozen:
            _report.say_unknown_steps(self, self._step_sizes.after(optimizer, (member[1:] for member in self._owned(optimizer))))
        if self.frozen:
            self._hold(optimizer, self.support or {})
        else:
            self.after_step(optimizer)
            self._hold(optimizer, self.held)
            self._hold(optimizer, self.cut)
        if not self._manual and not self._clock.counted:
            self._tick()

    def _tick(self) -> None:
        self.step, self._clock.counted = self.step + 1, True
        self._maybe_freeze(_target.advance(self))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._catch_up(trainer)
        _report.batch(self, trainer, batch_idx)

    def _catch_up(self, trainer: Trainer) -> None:
        """Count the steps of this batch that were not counted as they came."""
        if not self._manual:
            if self._clock.is_behind(trainer.global_step):
                self._tick()
            return
        ends = self._whole, _length.of_epochs(trainer, self._drift), trainer.max_steps
        for _ in range(self._clock.steps_since(trainer.global_step, self._batches(trainer), *ends)):
            self._tick()

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """What a form does to the weights after an optimiser step."""
        self.method.after_optimizer(self._step(optimizer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.attachment is not None:
            self.attachment.restore()
        _faults.check_weights(self)  # before a file is written
        _ranks.check_weights(self, trainer)
        _report.epoch(self, trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _swaps.evaluate(self._optimizers)
        _promises.close(self, trainer)
        self.prune()
        if self._averages is not None:
            self._averages.hand_over(trainer)
        _report.finish(self, trainer)
        self._ending = _endings.Ending(self)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._compared:  # this rank has no batches: those that have some wait for its answer
            _ranks.check_batches(self, trainer)
        if self._ending is None:  # a run resumed at its end trains nothing and has no on_train_end
            self.prune()
        else:
            self._ending.settle(self, trainer, "on_train_end")
        if self._averages is not None:
            self._averages.prune()
        self._ending = _endings.Ending(self)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self._finished and self._ending is not None:
            self._ending.settle(self, trainer, "on_fit_end")
        self._close()
        if stage == "fit" and self._ending is None:  # a tuner stopped before training
            self._ending = _endings.Ending(self)
        self._let_averages_go()
        self._optimizers, self._places, self._members = [], {}, {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if _refusals.saves_on_exception(trainer):  # the view for that file stays until the next setup or teardown
            self._release()
        else:
            self._close()
        self._ending = self._ending or _endings.Ending(self, failed=True)


def is_idle(optimizer: torch.optim.Optimizer) -> bool:
    """At rate 0, as torch's checkpointing steps an optimiser without state under FSDP2, to learn what its state will be."""
    return all(float(group.get("lr", 1.0)) == 0 for group in optimizer.param_groups)


def is_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """A fused optimiser is called for a step that its GradScaler skips, too, and told so by ``found_inf``."""
    return float(getattr(optimizer, "found_inf", None) or 0) > 0
