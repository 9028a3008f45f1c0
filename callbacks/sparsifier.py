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
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_sparse import archive, elementwise
from lightning_sparse.callbacks import best, checks, consistency, end_of_fit, endings, evaluation, logging, progress, weight_averaging
from lightning_sparse.callbacks.checkpointing import CheckpointState, callbacks_of, own_state
from lightning_sparse.callbacks.connections import Connections
from lightning_sparse.callbacks.form import SparsityCallback, forwarded, measured_by, peers_of
from lightning_sparse.callbacks.user_warnings import rank_zero_note, rank_zero_warn
from lightning_sparse.methods.base import Run
from lightning_sparse.step import Clock, Steps, is_idle, is_skipped
from lightning_sparse.target_search import TargetSearch


class Sparsifier(SparsityCallback):
    """Base of the callbacks that train a network to true zeros: defines the Lightning hooks."""

    def _reset(self) -> None:
        super()._reset()
        self.run = Run(
            self.weights, self.strength, self.engine, self.support, warn=rank_zero_warn, info=rank_zero_info, note=rank_zero_note
        )
        self.method.reset(self.run)
        self.search, self.clock, self.draws = TargetSearch(self.support), Clock(self.strength), progress.LoaderDraws()
        self.saved = CheckpointState(self.options, self.method, self.support, self.clock)
        self.steps = Steps(self.weights, self.strength, self.engine, self.sizes, self.clipping)
        self.watch = consistency.Watch(self.options, self.steps, self.settings)
        self.connections = Connections(self.run, self.method, self.options.compile)
        self.evaluation = evaluation.Evaluation(self.options.form, self.weights)
        self.end_of_fit = end_of_fit.EndOfFit(
            self.options, self.settings, self.method, self.support, self.evaluation.swaps, self._freeze, self.unreached
        )
        self.began_at_zero = checks.ZeroStart(self.options, self.support)
        self._moments = self.method.moments()  # those of a step at which the method acts
        self._batch: tuple[Any, int] | None = None  # last training batch, for the duality gap

    averages: weight_averaging.Averages | None = forwarded("connections.averages", "The averages of the weights during and after a fit.")

    def evaluated(self, name: str) -> Tensor:
        return self.weights.live(name) if self.averages is None else self.averages.evaluated(name)

    def figures(self) -> dict[str, float]:
        """Return the logged values, with shares in [0, 1]."""
        return self.measured.figures()

    def unreached(self) -> list[str]:
        """Describe the goals that the run has not met."""
        return endings.unreached(self.options, self.support, self.strength)

    # -- a fit starts --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if type(self) is Sparsifier:
            raise TypeError("Sparsifier, the base class, trains no zeros; use Sparsify, ReweightedPenalty, AdaptiveProx or AdaptiveMask")
        if stage == "fit":
            self.connections.detach_all()
            again = self.end_of_fit.state_for_next(trainer, pl_module, self.state_dict) if self.clock.begun else None
            self._reset()
            self.saved.restored, self.end_of_fit.fit = again, end_of_fit.Fit(trainer, pl_module)
            weight_averaging.move_to_front(self, trainer)
            checks.check_setup(self.options, self.method, self.strength, self.given, trainer)
            if not checks.is_built_later(pl_module):
                self.weights.parameters = progress.choose(self.options.select, trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.connections.begin(trainer, pl_module)
        self.method.prepare()
        self.weights.parameters = progress.choose(self.options.select, trainer, pl_module, self.saved.restored)
        self.connections.couple(trainer, pl_module)
        self._doubted = checks.check_fit(self.options, self.method, self.weights, trainer, pl_module)  # so no other warning of it
        consistency.check_same_settings(trainer, self.recipe(), self.weights)
        self.watch.prepare(trainer, pl_module)
        self._attach(trainer, pl_module)
        if self.options.keep_zeros:
            self.support.keep_zeros(self.weights.parameters)
        if self.saved.restored is not None:
            self.saved.restore(self.recipe(), self.averages)
        checks.check_reach(self.options, self.support, trainer, pl_module)
        logging.start(trainer, self.measured.pictures, [peer.recipe() for peer in peers_of(trainer)])

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the module, its averages and its optimisers; called again when parameters become trainable."""
        self.connections.attach(trainer, pl_module, self.end_of_fit.filed, self._begin_step, partial(self._end_step, trainer))

    def _add_new_parameters(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Include parameters that became trainable during the run."""
        new = progress.newly_trainable(self.weights, self.options.select, trainer, pl_module)
        if new or self.weights.trainable(trainer.optimizers) != self.connections.trainable:
            self.weights.parameters |= new
            checks.check_overlap(self.weights, trainer)
            self._attach(trainer, pl_module)
            if self.options.keep_zeros:
                self.support.keep_zeros(new)
            self.began_at_zero.check(new, pl_module)
            if self.frozen:
                self._freeze(new)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.watch.check_start()
        self.draws.record(partial(self._measure, trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.draws.repeat()
        self.watch.compare_batches(trainer)
        self.watch.check_start()
        self._measure(trainer)
        first = self.clock.begin(progress.steps_done(trainer, self.run.manual))
        if first and self.options.target_sparsity is not None:
            self.support.check_score()
        self.method.begin()
        endings.warn_new_length(self.options, self.support, self.strength, self.saved.planned)
        self.saved.planned = None
        if first and self.strength.target is not None:
            progress.begin_search(self.options, self.strength.target, endings.share_at_start(self.support), pl_module)
        self._advance()
        self.began_at_zero.check(self.weights.parameters if first else (), pl_module)
        best.warn_early_best(self.options, trainer)

    def _measure(self, trainer: Trainer) -> None:
        self.clock.measure(progress.total_steps(trainer, self.clock.drift, self.options, self.strength))
        self.run.batches = progress.batches_of_epoch(trainer, self.clock.whole)
        checks.check_target(self.options, self.support, self.strength, trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.averages is not None and self.averages.copy_before_batch_norm(trainer):  # because this epoch only updates batch norm
            self.support.freeze_zeros()
        if self.clock.begin_epoch(progress.drift_of(trainer, progress.steps_done(trainer, self.run.manual))):
            self._measure(trainer)

    # -- a step --------------------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        for optimizer in self.connections.with_modes:
            optimizer.train()  # before noise is added to the weights, so that a later train() changes nothing
        if batch_idx == 0 or self.weights.trainable(trainer.optimizers) != self.connections.trainable:
            self._add_new_parameters(trainer, pl_module)
        self._batch = (batch, batch_idx)
        self.clock.begin_batch(trainer.global_step)
        if "before_forward" in self._moments:
            self.method.before_forward(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if trainer.world_size > 1 or loss.numel() != 1 or not math.isfinite(loss.item()):  # else there is nothing to say
            self.watch.check_loss(trainer, loss)
        if "before_backward" in self._moments:
            self.method.before_backward(loss, self._scale_of(trainer))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "after_backward" in self._moments:
            overflowed = None if self.steps.scaler is None else partial(consistency.on_any_rank, trainer)
            self.method.after_backward(self._scale_of(trainer), overflowed)

    def _scale_of(self, trainer: Trainer) -> Callable[[], float]:
        return partial(self.steps.loss_scale, 1 if self.run.manual else trainer.accumulate_grad_batches)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.clock.prepare(optimizer) > 1:
            checks.check_closures(self.options.form, pl_module, optimizer)
        step = self.steps.of(optimizer)
        grads = [parameter.grad for _, parameter, _ in step.members if parameter.grad is not None]
        if grads:  # because an own step may clear them
            self.clock.idle = None
        if self.watch.checks_gradients and not elementwise.are_finite(grads):
            self.watch.check_gradients(trainer, optimizer)
        if self.strength.target is not None and self.search.measures(self.options.freeze):
            self.search.measure_gradients(optimizer, step.grad_scale)
            step = self.steps.of(optimizer)  # because a given lam may have been lowered
        if self.support.frozen is None:
            if self.support.score.needs_squares:
                self.support.squares.update(optimizer, self.support.groups, step.grad_scale)
            if "before_optimizer" in self._moments:
                self.run.acting.before_optimizer(step)
            if id(optimizer) in self.connections.measured:
                self.sizes.before(optimizer, ((p, group, self.weights.live(name)) for name, p, group in step.members))
        if not self.run.manual and (trainer.gradient_clip_val or self.watch.clips):  # because Lightning clips after this hook
            self.clipping.before_clipping(parameter.grad for _, parameter, _ in step.members)

    def _begin_step(self, optimizer: Optimizer) -> None:
        """Prepare for an optimiser's step; in automatic optimisation its forward and backward follow."""
        self.clock.begin_step(optimizer)
        if self.run.manual and not is_skipped(optimizer):  # after a skipped step the noise stays for the next forward
            self.weights.restore()

    def _end_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Handle the end of an optimiser's step."""
        listed, skipped = self in trainer.callbacks, is_skipped(optimizer)  # type: ignore[attr-defined] # not in a tuner's trial run
        if listed and not skipped and (self.clock.is_prepared(optimizer) or not is_idle(optimizer)):
            self._after_step(optimizer)
        self.clock.end_step(optimizer, stepped=not skipped)

    def _after_step(self, optimizer: Optimizer) -> None:
        """Update after a real optimiser step (not a skipped one, not an accumulation batch)."""
        support, members = self.support, self.weights.members(optimizer)
        if self.clock.idle is not None and any(member[1].grad is not None for member in members):
            self.clock.idle = None
        if support.frozen is None and self.method.requires_hook and not self.clock.is_prepared(optimizer):
            checks.refuse_unhooked(self.options.form, optimizer)
        if self.clipping.norm is not None:
            self.clipping.after_step(parameter.grad for _, parameter, _ in members)
        if support.frozen is None:
            if id(optimizer) in self.connections.measured:
                doubt = self.sizes.after(optimizer, (member[1:] for member in members))
                if doubt is not None and not self._doubted:
                    checks.warn_unknown_step_sizes(self.options, doubt, self.method.adds_gradients)
            if "after_optimizer" in self._moments:
                self.run.acting.after_optimizer(self.steps.of(optimizer))
        if support.frozen is not None or support.held or support.cut:
            support.hold_(optimizer)
        if not self.run.manual and not self.clock.counted:
            self._count_step()

    def _count_step(self) -> None:
        self.clock.count()
        self._advance(self.strength.target is not None and self.search.follow(self.options.freeze))

    def _advance(self, arrived: bool = False) -> None:
        """Do what is due at this step: update the method, and freeze if the target was met (``arrived``) or the time has come."""
        if "progress" in self._moments:
            self.method.progress()
        freeze = self.strength.frozen_share(self.options.freeze)
        if freeze and self.support.frozen is None and (arrived or self.strength.step >= round(self.strength.total * (1 - freeze))):
            before = self.support.share_of_zeros()
            self._freeze()
            endings.tell_parts(self.options, self.support, self.strength, before)

    def _freeze(self, new: Iterable[str] | None = None) -> None:
        """Freeze the supports of all parameters, at the target if there is one, or those of ``new`` ones as they are."""
        names, target = (self.weights.parameters, self.strength.target) if new is None else (new, None)
        self.method.freeze(names)
        self.support.freeze(names, None if target is None else target.target)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.clock.end_batch()
        if "after_batch" in self._moments:
            self.method.after_batch()
        for _ in range(progress.missing_batches(trainer, self.clock) if self.run.manual else self.clock.missing(trainer.global_step)):
            self._count_step()
        if self.measured.pictures.wanted:
            logging.batch(self.measured, measured_by(peers_of(trainer)), trainer, batch_idx)

    # -- validation and epochs -------------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.attachment is not None:
            self.watch.check_weights()
            self.evaluation.begin(trainer, pl_module)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch: Any, **more: Any) -> None:
        self.evaluation.begin_batch()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.evaluation.end_batches(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.evaluation.end()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights.restore()
        self.watch.check_weights()  # before a file is written
        consistency.check_same_weights(trainer, self.weights, self.support, self.strength.step)
        samples = self.options.gap_samples
        gap = logging.duality_gap(self.support, pl_module, self._batch, samples) if samples else None
        logging.epoch(self.measured, measured_by(peers_of(trainer)), trainer, pl_module, gap)

    # -- a fit ends ------------------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end_of_fit.end_training(trainer, self.averages, self.clock.idle, self.planned_end)
        self.began_at_zero.check_end(pl_module)
        logging.finish(self.measured, measured_by(peers_of(trainer)), trainer)
        self.end_of_fit.record()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.watch.compared:  # because this rank has no batches, and those that have some wait for its answer
            self.watch.compare_batches(trainer)
        self.end_of_fit.end_fit(trainer, self.averages)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.method.finish()
        if stage == "fit":
            self.end_of_fit.tear_down(trainer)
        self.connections.detach_all()
        self._batch = None
        self.weights.forget_optimizers()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # the view for a file that is written now stays until the next setup or teardown
        (self.connections.release if checks.saves_on_exception(trainer) else self.connections.detach)()
        self._batch = None
        self.end_of_fit.record_failure()
        logging.interrupted(self.measured.pictures, trainer)

    # -- files -----------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs: the step, and the live values of weights that are zero in the file."""
        if self.saved.is_waiting:  # a tuner saves before on_fit_start
            return self.saved.restored or {}
        return self.saved.collect(self.end_of_fit.filed, self.end_of_fit.is_frozen, self.recipe(), self.averages)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.end_of_fit.complete_file(checkpoint, pl_module, self.state_key, self.saved.is_waiting)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        consistency.on_rank_zero(trainer, partial(archive.check, trainer.ckpt_path))
        own = own_state(checkpoint, self.state_key, self.options, trainer, pl_module)
        if self.attachment is None:
            self.weights.parameters = progress.choose(self.options.select, trainer, pl_module, own)
        if self.state_key not in callbacks_of(checkpoint):  # continue from another callback's state of the same parameters
            self.load_state_dict(own)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.saved.load(state_dict):
            self.saved.restore(self.recipe(), self.averages)

    def check_state(self, state: Any) -> None:
        """Raise ValueError, naming the entry, unless ``state`` is one that this callback saves. Nothing is loaded."""
        self.saved.check(state)
