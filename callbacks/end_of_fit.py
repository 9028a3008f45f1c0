"""End a fit: true zeros, what files hold from then on, weights that others change later, and a second fit that continues."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_sparse import elementwise
from lightning_sparse.callbacks import endings, logging
from lightning_sparse.callbacks.evaluation import Swaps
from lightning_sparse.callbacks.form import measured_by, peers_of
from lightning_sparse.callbacks.options import Options
from lightning_sparse.callbacks.user_warnings import rank_zero_warn
from lightning_sparse.callbacks.weight_averaging import Averages, Snapshot, hooks_of, with_modes
from lightning_sparse.methods.base import Method
from lightning_sparse.select import owners
from lightning_sparse.support import Support
from lightning_sparse.weights import WeightStore

SMALL = 0.01  # share of the weights' squared norm: an average copied into the module is pruned if that removes less


class Ending:
    """Records what a callback left in the module when training ended or failed: files hold what the module holds."""

    def __init__(self, weights: WeightStore, support: Support, failed: bool = False) -> None:
        self.weights, self.support, self.failed = weights, support, failed
        self._left = Snapshot(weights, alone=failed)  # because the other ranks may not have failed

    def has_final(self, name: str) -> bool:
        """Return True if files show a parameter's data as they are: true zeros, or values written by others since."""
        return not self.failed or self._left.changed(name)

    @property
    def is_frozen(self) -> bool:
        """Return True if the support is frozen and the weights that a file written now holds lie in it."""
        frozen = self.support.frozen
        if frozen is None or self.failed:
            return self.support.is_frozen
        return all(_lies_in(self.weights.live(name), kept) for name, kept in frozen.items())

    def handle_changed_weights(self, form: str, trainer: Trainer, hook: str, swaps: Swaps) -> None:
        """Prune an average that another callback's ``hook`` copied in, leave other changed weights alone, and log again."""
        changed = self._left.differs()
        if trainer.world_size > 1:
            changed = trainer.strategy.reduce_boolean_decision(changed, all=False)
        if not changed:
            return
        lost = self.support.lost()
        if swaps.seen or lost <= SMALL:
            self.support.prune()
        run = measured_by(peers_of(trainer))
        for one in run:
            if one.support is self.support or one is run[-1]:  # the last one logs the totals
                logging.finish(one, run, trainer)
        if not swaps.seen and lost > SMALL:
            rank_zero_warn(
                f"the weights were changed in {hook} ({', '.join(hooks_of(trainer, [hook])) or 'of another callback'}), after "
                f"{form} had set its zeros; setting them again would remove {lost:.0%} of the new weights' squared norm, so they "
                "are left as they are, and the sparsity logged last is theirs. If they are an average of the trained weights, call the "
                "callback's prune() after fit; if they are those of the best epoch, add BestAfterTarget() so that the epoch is sparse"
            )


def _lies_in(w: Tensor, kept: Tensor) -> bool:
    return int(elementwise.sum_shards(((elementwise.local_part(w) != 0) & ~elementwise.local_part(kept).to(w.device)).sum(), w)) == 0


class EndOfFit:
    """Ends a callback's fit: prunes to the target or warns, makes the zeros true, and handles weights that others change afterwards.

    Args:
        options: the callback's shared arguments.
        settings: returns all its arguments, by name.
        method: how it trains.
        support: its support, with the weights and the strength.
        swaps: the exchanges of weights in its validations.
        freeze: freezes the supports of all parameters at its target.
        unreached: describes the goals that the run has not met.
    """

    def __init__(
        self,
        options: Options,
        settings: Callable[[], dict[str, Any]],
        method: Method,
        support: Support,
        swaps: Swaps,
        freeze: Callable[[], None],
        unreached: Callable[[], list[str]],
    ) -> None:
        self.options, self.settings, self.method, self.support = options, settings, method, support
        self.swaps, self.freeze, self.unreached = swaps, freeze, unreached
        self.weights, self.strength = support.weights, support.strength
        self.fit = Fit()
        self.ending: Ending | None = None  # training is over

    def filed(self, name: str) -> Tensor:
        """Return what a file written now holds of a parameter: thresholded weights in training, later the module's own."""
        own = self.ending is not None and self.ending.has_final(name)
        return self.weights.live(name) if own else self.support.thresholded(name)

    @property
    def is_frozen(self) -> bool:
        """Return True if the support is frozen and the weights that a file written now holds lie in it."""
        return self.support.is_frozen if self.ending is None else self.ending.is_frozen

    def complete_file(self, checkpoint: dict[str, Any], module: LightningModule, key: str, waits: bool) -> None:
        """Write thresholded weights into a file that no hook has thresholded, and drop the state under ``key`` from one of another module.

        ``waits``: a loaded state is not restored yet.
        """
        parameters = self.weights.parameters
        if self.weights.attachment is None and not self.is_done and parameters and not waits:  # after an exception hooks are removed
            write_view(checkpoint["state_dict"], module, parameters, self.filed)
        own = {id(parameter) for parameter in module.parameters()}
        if self.ending is not None and any(id(parameter) not in own for parameter in parameters.values()):
            checkpoint.get("callbacks", {}).pop(key, None)  # the file holds another module than the trained one

    @property
    def is_done(self) -> bool:
        """Return True if training has ended without an error."""
        return self.ending is not None and not self.ending.failed

    def state_for_next(self, trainer: Trainer, module: LightningModule, state: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Return the state that a second fit continues from; None if the first took no step or its zeros were changed since."""
        if not self.fit.continues(trainer, module) or not self.strength.step or was_changed(self.weights, self.support):
            return None
        return state_for_next_fit(state(), self.weights)

    def end_training(self, trainer: Trainer, averages: Averages | None, idle: int | None, due: float) -> None:
        """Meet the target if that is wanted, or warn, and make the zeros true.

        ``idle``: batches, if no optimiser has stepped. ``due``: share of the run by which all goals were to be met.
        """
        for optimizer in with_modes(self.weights.optimizers):
            optimizer.eval()  # because a later eval() must change nothing
        if idle:
            endings.warn_untrained(self.options, idle)
        self._meet_target(trainer, due)
        self.support.prune()
        if averages is not None:
            averages.copy_to_module(trainer)
        endings.warn_collapsed(self.options, self.support, self.strength, self.settings())

    def _meet_target(self, trainer: Trainer, due: float) -> None:
        """Prune to the target at the end if ``finish="prune"``, else warn once of what the run did not reach.

        A schedule that is behind because a GradScaler skipped steps gives no warning: only one that was cut short does.
        """
        options, support, strength = self.options, self.support, self.strength
        if not self.weights.parameters:
            return
        missed = self.unreached() if strength.step < strength.total and not support.is_frozen else []
        missed += endings.schedule_left(options, support, strength) if trainer.should_stop else []
        prunes = bool(missed) and options.finish == "prune"
        if prunes:
            self.freeze()
        if missed:
            endings.warn_target_missed(options, strength, missed, due, support if prunes else None)
        elif not trainer.fast_dev_run:  # type: ignore[attr-defined]
            endings.warn_few_zeros(options, support, strength, self.settings(), self.method.movement())

    def end_fit(self, trainer: Trainer, averages: Averages | None) -> None:
        """Handle what the hooks on_train_end of others did to the weights."""
        if self.ending is None:  # a run resumed at its end has no on_train_end
            endings.warn_no_training(self.options, self.support, trainer)
            self.support.prune()
        else:
            self.ending.handle_changed_weights(self.options.form, trainer, "on_train_end", self.swaps)
        if averages is not None:
            averages.prune()
        self.record()
        if peers_of(trainer)[-1].support is self.support and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            endings.say_what_next(trainer)

    def tear_down(self, trainer: Trainer) -> None:
        """Handle what the hooks on_fit_end of others did to the weights."""
        if self.ending is None:  # because a tuner stopped before training
            self.weights.restore()
            self.record()
        elif not self.ending.failed:
            self.ending.handle_changed_weights(self.options.form, trainer, "on_fit_end", self.swaps)

    def record(self) -> None:
        """Record what the module holds now that training has ended."""
        self.ending = Ending(self.weights, self.support)

    def record_failure(self) -> None:
        """Record what the module holds when training has failed."""
        self.ending = self.ending or Ending(self.weights, self.support, failed=True)


class Fit:
    """Identifies the Trainer and the module of a callback's last fit, to detect a second fit that continues it.

    A copy or a pickle of it holds neither.
    """

    def __init__(self, trainer: Trainer | None = None, module: LightningModule | None = None) -> None:
        self._known = tuple(weakref.ref(one) for one in (trainer, module) if one is not None)

    def continues(self, trainer: Trainer, module: LightningModule) -> bool:
        """Return True if the same Trainer, which has trained before, fits the same module again."""
        known = [one() for one in self._known]
        return len(known) == 2 and known[0] is trainer and known[1] is module and trainer.fit_loop.total_batch_idx >= 0

    def __reduce__(self) -> tuple[type[Fit], tuple[()]]:
        return Fit, ()


@torch.no_grad()
def was_changed(weights: WeightStore, support: Support) -> bool:
    """Return True if weights held at zero have been given other values since, because they are to be trained again."""
    masks = [*support.held.items(), *support.cut.items(), *(support.frozen or {}).items()]
    pruned = (elementwise.local_part(weights.parameters[name].detach())[~elementwise.local_part(where)] for name, where in masks)
    return any(bool((values != 0).any()) for values in pruned)


@torch.no_grad()
def state_for_next_fit(state: dict[str, Any], weights: WeightStore) -> dict[str, Any]:
    """Return the ``state`` that a second fit of the same Trainer continues from.

    The module's weights stay as they are. The optimiser is new, so none of its state is included.
    """
    live = {name: elementwise.full_tensor(parameter.detach()) for name, parameter in weights.parameters.items()}
    kept = {key: value for key, value in state.items() if key != "averaged"}
    kept |= {"moments": {}} if "moments" in state else {}
    return kept | {"taken": {name: w[w == 0].cpu() for name, w in live.items()}}


def write_view(state: dict[str, Any], module: nn.Module, parameters: Mapping[str, nn.Parameter], view: Callable[[str], Tensor]) -> None:
    """Write the view of each selected parameter into a state dict of ``module``, under every name that it has there."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    for key, _, _, parameter in owners(module):
        if id(parameter) in names:
            value = view(names[id(parameter)])
            if elementwise.is_sharded(value) and not elementwise.is_sharded(state.get(key)):  # a full state dict, on rank 0 only
                value = elementwise.full_tensor(value).cpu()
            if key in state:
                state[key] = value
