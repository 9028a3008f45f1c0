"""Define the Lightning hooks of the sparsity callbacks, in the order of a fit. Collaborators do the work.

=============================  ===========================================================================================
hook                           what happens
=============================  ===========================================================================================
setup                          reset the state, choose the parameters, check the run
on_fit_start                   check parameters, optimisers and method; attach to weights, averages and optimisers
on_train_start                 measure the run's length; method.begin
on_train_epoch_start           measure the length again where the loader was made anew
on_train_batch_start           add parameters that became trainable; method.before_forward
on_before_backward             check the loss; method.before_backward
on_after_backward              method.after_backward
on_before_optimizer_step       check the gradients; method.before_optimizer; measure step sizes and clipping
(an optimiser's step begins)   manual optimisation: restore the live weights
(an optimiser has stepped)     method.after_optimizer; keep pruned weights at zero; count the step; update lam towards the target;
                               method.progress; freeze the support where that is due
on_train_batch_end             method.after_batch; count steps that Lightning skipped; log histograms
on_validation_...              show thresholded weights, restore the live ones before training continues
on_train_epoch_end             check the weights, log the figures
on_train_end, on_fit_end       prune to the target or warn, make the zeros true; handle weights that others changed since
teardown, on_exception         restore the live weights, remove the hooks
state_dict, on_save_... and    thresholded weights in the file, in the callback's state what the threshold took;
on_load_checkpoint             an exact continuation from both
=============================  ===========================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse import archive, elementwise
from lightning_sparse.callbacks import best, checks, consistency, endings, logging, progress, weight_averaging
from lightning_sparse.callbacks.checkpointing import CheckpointState, callbacks_of
from lightning_sparse.callbacks.connections import Connections
from lightning_sparse.callbacks.form import SparsityCallback
from lightning_sparse.callbacks.user_warnings import rank_zero_warn
from lightning_sparse.methods.base import Run
from lightning_sparse.optimizer import grad_scale
from lightning_sparse.step import Clock, Step, is_idle, is_skipped
from lightning_sparse.structure import Coupled
from lightning_sparse.target_search import TargetSearch
from lightning_sparse.weights import write_view


class Sparsifier(SparsityCallback):
    """Base of the callbacks that train a network to true zeros: defines the Lightning hooks."""

    def _reset(self) -> None:
        super()._reset()
        self.run = Run(self.weights, self.strength, self.engine, self.support, warn=rank_zero_warn, info=rank_zero_info)
        self.method.reset(self.run)
        self.search = TargetSearch(self.support)
        self.clock = Clock(self.strength)
        self.saved = CheckpointState(self.options, self.method, self.weights, self.support, self.clock, self.clipping, self.sizes)
        self.watch = consistency.Watch(self.options, self.weights, self.strength, self.settings)
        self.connections = Connections(self.run, self.method)
        self.swaps = weight_averaging.Swaps()
        self.fit = endings.Fit()
        self.ending: endings.Ending | None = None  # training is over
        self._moments = self.method.moments()  # those of a step at which the method acts
        self._trainable: tuple[int, ...] = ()  # changes when parameters become trainable
        self._doubted = False  # the method has warned of an optimiser
        self._logs_histograms = False  # to W&B
        self._batch: tuple[Any, int] | None = None  # last training batch, for the duality gap
        self._began_at_zero: list[str] = []  # parameters that were all zero when training started, and not held there
        self._compared = False  # the ranks' numbers of batches have been compared

    @property
    def averages(self) -> weight_averaging.Averages | None:
        """Return the averages of the weights during and after a fit."""
        return self.connections.averages

    def evaluated(self, name: str) -> Tensor:
        return self.weights.live(name) if self.averages is None else self.averages.evaluated(name)

    def figures(self) -> dict[str, float]:
        """Return the logged values, as fractions in [0, 1] where they are shares."""
        return logging.figures(self)

    def unreached(self) -> list[str]:
        """Describe the goals that the run has not met, one phrase each; empty once the support is frozen."""
        return endings.unreached(self.options, self.support, self.strength)

    # -- a fit starts --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if type(self) is Sparsifier:
            raise TypeError("Sparsifier is the base class and trains no zeros; use ReweightedPenalty, AdaptiveProx or AdaptiveMask")
        if stage == "fit":
            self.connections.detach()
            self.connections.detach_averages()
            again = self._state_of_last_fit() if self.fit.continues(trainer, pl_module) else None
            self._reset()
            self.saved.restored, self.fit = again, endings.Fit(trainer, pl_module)
            weight_averaging.move_to_front(self, trainer)
            checks.check_run(self.options, self.method, trainer)
            checks.check_reachable(self.options, self.method, self.strength, self.given)
            if not checks.is_built_later(pl_module):
                self.weights.parameters = progress.choose(self.options.select, trainer, pl_module)

    def _state_of_last_fit(self) -> dict[str, Any] | None:
        """Return the state that a second fit continues from; None if the first took no step or its zeros were changed since."""
        if not self.strength.step or not self.clock.begun or endings.was_changed(self.weights, self.support):
            return None
        return endings.state_for_next_fit(self.state_dict(), self.weights)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run.seed, self.run.rank = trainer.strategy.broadcast(torch.initial_seed()), trainer.global_rank  # one seed for all
        self.run.mean = partial(trainer.strategy.reduce, reduce_op="mean") if trainer.world_size > 1 else None
        self.run.total = partial(consistency.sum_over_ranks, trainer)
        self.clock.manual = self.run.manual = not pl_module.automatic_optimization
        self.method.prepare()
        self.weights.parameters = progress.choose(self.options.select, trainer, pl_module, self.saved.restored)
        if isinstance(self.options.structure, Coupled):
            self.run.couple(self.options.structure, pl_module, progress.example_inputs(trainer, pl_module))
        checks.check_optimizers(self.options.form, self.weights, trainer.optimizers)
        checks.check_overlap(self, trainer)
        checks.warn_skipped(self.options, pl_module)
        checks.warn_coverage(self, trainer, pl_module)
        doubts = [self.method.check(optimizer, self.weights.members(optimizer)) for optimizer in trainer.optimizers]
        for doubt in filter(None, doubts):
            rank_zero_warn(doubt)
        self._doubted = any(doubts)
        consistency.check_same_settings(trainer, self.recipe(), self.weights)
        self.watch.prepare(trainer, pl_module)
        self._attach(trainer, pl_module)
        if self.options.keep_zeros:
            self.support.keep_zeros(self.weights.parameters)
        if self.saved.restored is not None:
            self.saved.restore(self.recipe(), self.averages)
        self._logs_histograms = logging.start(trainer)

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the module, its averages and its optimisers; called again when parameters become trainable."""
        end = partial(self._end_step, trainer)
        self.connections.attach(trainer, pl_module, self._filed, self._begin_step, end, self.options.compile)
        self._trainable = self._count_trainable(trainer)

    def _count_trainable(self, trainer: Trainer) -> tuple[int, ...]:
        """Return numbers that change when parameters become trainable: groups per optimiser, and trainable selected parameters."""
        groups = [len(optimizer.param_groups) for optimizer in trainer.optimizers]
        return (*groups, sum(parameter.requires_grad for parameter in self.weights.parameters.values()))

    def _add_new_parameters(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Include parameters that became trainable during the run."""
        new = progress.newly_trainable(self.weights, self.options.select, trainer, pl_module)
        if new or self._count_trainable(trainer) != self._trainable:
            self.weights.parameters |= new
            checks.check_overlap(self, trainer)
            self._attach(trainer, pl_module)
            if self.options.keep_zeros:
                self.support.keep_zeros(new)
            self._check_all_zero(new, pl_module)
            if self.frozen:
                self._freeze(new)

    def _check_all_zero(self, names: Iterable[str], module: LightningModule) -> None:
        """Check for parameters whose weights are all zero at the start."""
        held = {name: self.support.held[name] for name in names if name in self.support.held}
        live = {name: self.weights.live(name) for name in names}
        self._began_at_zero += checks.warn_all_zero(self.options, held, live, module)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.watch.check_start()
        self._measure(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._compare_batches(trainer)
        self.watch.check_start()
        self._measure(trainer)
        first = self.clock.begin(progress.steps_done(trainer, self.clock.manual))
        self.method.begin()
        endings.warn_new_length(self.options, self.support, self.strength, self.saved.planned)
        self.saved.planned = None
        self._advance()
        self._check_all_zero(self.weights.parameters if first else (), pl_module)
        best.warn_early_best(self, trainer)

    def _compare_batches(self, trainer: Trainer) -> None:
        self._compared = True
        consistency.check_batches(trainer)

    def _measure(self, trainer: Trainer) -> None:
        self.clock.measure(progress.total_steps(trainer, self.clock.drift, self.options, self.strength))
        self.run.batches = progress.batches_of_epoch(trainer, self.clock.whole)
        if self.strength.target is not None and self.options.keep_zeros and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            checks.check_target(self.strength.target.target, self.share_of_zeros())

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.averages is not None and self.averages.copy_before_batch_norm(trainer):  # because this epoch only updates batch norm
            self.support.freeze_zeros()
        if self.clock.begin_epoch(progress.drift_of(trainer, progress.steps_done(trainer, self.clock.manual))):
            self._measure(trainer)

    # -- a step --------------------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.connections.with_modes:
            weight_averaging.train(self.connections.with_modes)
        if batch_idx == 0 or self._count_trainable(trainer) != self._trainable:
            self._add_new_parameters(trainer, pl_module)
        self._batch = (batch, batch_idx)
        self.clock.begin_batch(trainer.global_step)
        if "before_forward" in self._moments:
            self.method.before_forward(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if trainer.world_size > 1 or loss.numel() != 1 or not math.isfinite(loss.item()):  # else there is nothing to say
            self.watch.check_loss(trainer, loss)
        if "before_backward" in self._moments:
            self.method.before_backward(loss, partial(self._loss_scale, trainer))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "after_backward" in self._moments:
            overflowed = None if self.watch.scaler is None else partial(consistency.on_any_rank, trainer)
            self.method.after_backward(partial(self._loss_scale, trainer), overflowed)

    def _loss_scale(self, trainer: Trainer) -> float:
        """Return the factor on the loss in backward: the fp16 scale divided by the number of accumulated batches."""
        factor = 1.0 if self.watch.scaler is None else float(self.watch.scaler.get_scale())
        return factor / (1 if self.clock.manual else trainer.accumulate_grad_batches)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if (evaluations := self.clock.prepare(optimizer)) > 1:
            checks.check_closures(self.options.form, pl_module, optimizer, evaluations)
        step = self._step(optimizer)
        grads = [parameter.grad for _, parameter, _ in step.members if parameter.grad is not None]
        if self.watch.checks_gradients and not elementwise.are_finite(grads):
            self.watch.check_gradients(trainer, optimizer)
        if self.support.score.needs_squares:
            self.support.measure_squares(optimizer, step.grad_scale)
        if self.strength.target is not None and self.search.is_due(self.options.freeze, ahead=1):
            self.search.measure_gradients(optimizer, step.grad_scale)
        if self.support.frozen is None:
            if "before_optimizer" in self._moments and self.run.weights is self.weights:
                self.method.before_optimizer(step)
            elif "before_optimizer" in self._moments:  # on the sizes of groups
                self.run.before_optimizer(self.method, step)
            if id(optimizer) in self.connections.measured:
                self.sizes.before(optimizer, ((p, group, self.weights.live(name)) for name, p, group in step.members))
        clips = bool(trainer.gradient_clip_val or "configure_gradient_clipping" in self.watch.own_hooks)
        if clips and not self.clock.manual:  # Lightning clips after this hook; a manual loop clips before it
            self.clipping.before_clipping(parameter.grad for _, parameter, _ in step.members)

    def _step(self, optimizer: Optimizer) -> Step:
        """Return what the method needs to know of one step of ``optimizer``."""
        scaler = self.watch.scaler
        return Step(
            optimizer,
            self.weights.members(optimizer),
            self.strength.lam,
            self.engine,
            self.weights.live,
            self.sizes,
            grad_scale=1.0 if scaler is None else grad_scale(scaler, optimizer),
            loss_scale=_unit_scale if scaler is None else scaler.get_scale,
            clip_factor=self.clipping.last,
        )

    def _begin_step(self, optimizer: Optimizer) -> None:
        """Prepare for an optimiser's step; in automatic optimisation its forward and backward follow."""
        self.clock.begin_step(optimizer)
        if self.clock.manual and not is_skipped(optimizer):  # after a skipped step the noise stays for the next forward
            self.weights.restore()

    def _end_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Handle the end of an optimiser's step."""
        listed = self in trainer.callbacks  # type: ignore[attr-defined] # False in a tuner's trial run, which is undone
        skipped = is_skipped(optimizer)
        if listed and not skipped and (self.clock.is_prepared(optimizer) or not is_idle(optimizer)):
            self._after_step(trainer, optimizer)
        self.clock.end_step(optimizer, stepped=not skipped)

    def _after_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Update after a real optimiser step (not a skipped one, not an accumulation batch)."""
        support, members = self.support, self.weights.members(optimizer)
        if support.frozen is None and self.method.requires_hook and not self.clock.is_prepared(optimizer):
            checks.refuse_unhooked(self.options.form, optimizer)
        if self.clipping.norm is not None:
            self.clipping.after_step(parameter.grad for _, parameter, _ in members)
        if support.frozen is None:
            if id(optimizer) in self.connections.measured:
                doubt = self.sizes.after(optimizer, (member[1:] for member in members))
                if not self._doubted:
                    checks.warn_unknown_step_sizes(self.options, doubt, self.method.adds_gradients)
            if "after_optimizer" in self._moments and self.run.weights is self.weights:
                self.method.after_optimizer(self._step(optimizer))
            elif "after_optimizer" in self._moments:
                self.run.after_optimizer(self.method, self._step(optimizer))
        if support.frozen is not None or support.held or support.cut:
            support.hold_(optimizer)
        if not self.clock.manual and not self.clock.counted:
            self._count_step()

    def _count_step(self) -> None:
        """Count one step."""
        self.clock.count()
        self._advance(self.strength.target is not None and self.search.follow(self.options.freeze))

    def _advance(self, arrived: bool = False) -> None:
        """Do what is due at this step: update the method, and freeze if the target was met (``arrived``) or the time has come."""
        if "progress" in self._moments:
            self.method.progress()
        freeze = self.options.freeze
        if freeze and self.support.frozen is None and (arrived or self.strength.step >= round(self.strength.total * (1 - freeze))):
            endings.tell_parts(self.options.form, self.support, self.strength)
            self._freeze(self.weights.parameters, self.strength.target)

    def _freeze(self, names: Iterable[str], target: Any = None) -> None:
        self.method.freeze(names)
        self.support.freeze(names, None if target is None else target.target)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if "after_batch" in self._moments:
            self.method.after_batch()
        manual = self.clock.manual
        for _ in range(progress.missing_batches(trainer, self.clock) if manual else self.clock.missing(trainer.global_step)):
            self._count_step()
        if self._logs_histograms:
            logging.batch(self, trainer, batch_idx)

    # -- validation and epochs -------------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.attachment is not None:
            self.watch.check_weights()
            self.attachment.restore()
            self.swaps.begin(self.weights, trainer)
            self.attachment.show_in_forwards(pl_module)  # because others exchange the weights before the first batch

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.attachment is not None and not self.attachment.shown:
            self.attachment.end_forwards()
            self.swaps.compare()
            self.attachment.show()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.attachment is not None:
            weight_averaging.check_undone(self.options.form, self.attachment, trainer, pl_module)
            self.attachment.restore()  # exchanged weights are restored unchanged
            self.attachment.show_in_forwards(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.attachment is not None:
            self.attachment.end_forwards()
            self.attachment.restore()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights.restore()
        self.watch.check_weights()  # before a file is written
        consistency.check_same_weights(trainer, self.weights, self.support, self.strength.step)
        logging.epoch(self, trainer, pl_module, self._batch)

    # -- a fit ends ------------------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weight_averaging.evaluate(self.weights.optimizers)
        self._apply_finish(trainer)
        self.prune()
        if self.averages is not None:
            self.averages.copy_to_module(trainer)
        endings.warn_collapsed(self.options, self.support)
        checks.warn_still_zero(self.options, {name: self.parameters[name] for name in self._began_at_zero}, pl_module)
        logging.finish(self, trainer)
        self.ending = endings.Ending(self.weights, self.support)

    def _apply_finish(self, trainer: Trainer) -> None:
        """Prune to the target at the end if ``finish="prune"``, else warn once of what the run did not reach.

        A schedule that is behind because a GradScaler skipped steps gives no warning: only one that was cut short does.
        """
        if not self.parameters:
            return
        missed = self.unreached() if self.strength.step < self.strength.total else []
        missed += endings.schedule_left(self.options, self.support, self.strength) if trainer.should_stop else []
        prunes = bool(missed) and self.options.finish == "prune"
        if prunes:
            self._freeze(self.weights.parameters, self.strength.target)
        if missed:
            endings.warn_target_missed(self.options, self.strength, missed, self.planned_end, self.support if prunes else None)
        elif not trainer.fast_dev_run:  # type: ignore[attr-defined]
            endings.warn_few_zeros(self.options, self.support, self.strength, self.settings(), self.method.movement())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._compared:  # because this rank has no batches, and those that have some wait for its answer
            self._compare_batches(trainer)
        if self.ending is None:  # a run resumed at its end has no on_train_end
            self.prune()
        else:
            self.ending.handle_changed_weights(self, trainer, "on_train_end", self.swaps)
        if self.averages is not None:
            self.averages.prune()
        self.ending = endings.Ending(self.weights, self.support)
        endings.say_what_next(self, trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.method.finish()
        if stage == "fit" and self.ending is not None and not self.ending.failed:
            self.ending.handle_changed_weights(self, trainer, "on_fit_end", self.swaps)
        self.connections.detach()
        self._batch = None
        if stage == "fit" and self.ending is None:  # because a tuner stopped before training
            self.ending = endings.Ending(self.weights, self.support)
        self.connections.detach_averages()
        self.weights.forget_optimizers()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if checks.saves_on_exception(trainer):  # the view for that file stays until the next setup or teardown
            self.connections.release()
        else:
            self.connections.detach()
        self._batch = None
        self.ending = self.ending or endings.Ending(self.weights, self.support, failed=True)
        logging.interrupted(self, trainer)

    # -- files -----------------------------------------------------------------------------------------------------------------

    def _filed(self, name: str) -> Tensor:
        """Return what a file written now holds of a parameter: thresholded weights in training, later the module's own."""
        own = self.ending is not None and self.ending.has_final(name)
        return self.weights.live(name) if own else self.support.thresholded(name)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs: the step, and the live values of weights that are zero in the file."""
        if self.saved.is_waiting:  # a tuner saves before on_fit_start
            return self.saved.restored or {}
        frozen = self.frozen if self.ending is None else self.ending.is_frozen
        return self.saved.collect(self._filed, frozen, self.recipe(), self.averages)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        finished = self.ending is not None and not self.ending.failed
        gone = self.attachment is None and not finished  # after an exception: hooks are removed, the state remains
        if gone and self.parameters and not self.saved.is_waiting:
            write_view(checkpoint["state_dict"], pl_module, self.parameters, self._filed)
        own = {id(parameter) for parameter in pl_module.parameters()}
        if self.ending is not None and any(id(parameter) not in own for parameter in self.parameters.values()):
            checkpoint.get("callbacks", {}).pop(self.state_key, None)  # because the file holds another module than the one that was trained

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        consistency.on_rank_zero(trainer, partial(archive.check, trainer.ckpt_path))
        states, patterns = callbacks_of(checkpoint), self.options.select
        others = (state for state in states.values() if progress.fits(patterns, trainer, pl_module, state))
        own = states[self.state_key] if self.state_key in states else next(others, {})
        if self.attachment is None:
            self.weights.parameters = progress.choose(patterns, trainer, pl_module, own)
        if self.state_key not in states:  # continue from another callback's state of the same parameters
            self.load_state_dict(own)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.saved.load(state_dict):
            self.saved.restore(self.recipe(), self.averages)

    def check_state(self, state: Any) -> None:
        """Raise ValueError, naming the entry, unless ``state`` is one that this callback saves. Nothing is loaded."""
        self.saved.check(state)


def _unit_scale() -> float:
    return 1.0
