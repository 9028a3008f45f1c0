"""Callbacks with one defect each, and the check that must detect it."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from pathlib import Path

import pytest
from subjects import Alone

from lightning_sparse import conformance, noise, penalties
from lightning_sparse.callbacks import AdaptiveMask, AdaptiveProx, MagnitudePruning, ReweightedPenalty

LOG_SUM = penalties.LogSum(eps=2.0)


class Blind(AdaptiveProx):
    """Does not check gradients."""

    def on_before_optimizer_step(self, *args):
        pass


class Heedless(Blind):
    """Checks neither gradients nor losses nor initial weights."""

    def on_before_backward(self, *args):
        pass

    def on_train_start(self, trainer, module):
        self._measure(trainer)

    on_sanity_check_start = on_train_start
    on_validation_start = on_train_epoch_end = on_before_backward


class Forgetful(AdaptiveMask):
    """Does not restore the module after an error."""

    def on_exception(self, *args):
        pass


class Trusting(ReweightedPenalty):
    """Verifies no checksums, and ignores invalid states."""

    def on_load_checkpoint(self, *args):
        pass


class Odd(ReweightedPenalty):
    """Saves a Path in its state."""

    def state_dict(self):
        return super().state_dict() | {"folder": Path.cwd()}


class Silent(ReweightedPenalty):
    """Does not warn about a missed target."""

    def unreached(self):
        return []


class Mute(ReweightedPenalty):
    """Gives no warnings at the end of training."""

    def on_train_end(self, *args):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            super().on_train_end(*args)


class Waiting(ReweightedPenalty):
    """Reaches the target by lam alone, without ranking."""

    def _count_step(self):
        self.clock.count()


class Anew(MagnitudePruning):
    """Starts every fit from the beginning."""

    def setup(self, *args):
        vars(self).update(vars(copy.deepcopy(self)))
        super().setup(*args)


class Falls(MagnitudePruning):
    """Follows the longer run's ramp after a resume, even if the target falls."""

    def on_train_start(self, *args):
        self.strength.least = 0.0
        super().on_train_start(*args)


MUTANTS = {
    "a_run_stopped_early_says_what_it_missed": partial(Silent, LOG_SUM, target_sparsity=0.7),
    "a_run_without_zeros_says_so": partial(Mute, LOG_SUM, 1e-3),
    "a_target_is_met_in_a_few_steps": partial(Waiting, LOG_SUM, target_sparsity=0.7),
    "a_longer_run_keeps_its_target": partial(Falls, 0.7, every=2),
    "a_second_fit_goes_on": partial(Anew, 0.7, every=2),
    "a_loss_that_is_not_finite": partial(Heedless, LOG_SUM, 0.5),
    "gradients_that_are_not_finite": partial(Blind, LOG_SUM, 0.2),
    "weights_that_are_not_finite": partial(Heedless, LOG_SUM, 0.5),
    "an_exception_leaves_the_module": partial(Forgetful, LOG_SUM, 0.5, noise=noise.ScaledBernoulli()),
    "ctrl_c_leaves_the_module": partial(Forgetful, LOG_SUM, 0.5),
    "a_full_disk_while_saving": partial(Forgetful, LOG_SUM, 0.5),
    "flipped_bits_are_refused": partial(Trusting, LOG_SUM, 0.5),
    "files_load_safely": partial(Odd, LOG_SUM, 0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("check", MUTANTS)
def test_the_check_detects_the_broken_callback(check):
    outcome = conformance.outcome(conformance.Subject("broken", Alone(MUTANTS[check])), check)
    assert outcome.verdict == "fail", outcome
